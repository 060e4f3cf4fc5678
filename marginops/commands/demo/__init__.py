"""The command ``marginops demo``: minimal-margin selection compared with uniform sampling."""
