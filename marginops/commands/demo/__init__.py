"""The ``marginops demo`` command: minimal margin selection against uniform sampling."""
