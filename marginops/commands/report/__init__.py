"""The command ``marginops report``: one HTML file about a recorded run."""
