"""The one shape of all claims: what they state, the command that tests them, and their page."""
