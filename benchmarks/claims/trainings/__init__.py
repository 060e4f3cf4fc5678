"""What one run of each claim does. A finished run is valid as long as its module stays the same."""
