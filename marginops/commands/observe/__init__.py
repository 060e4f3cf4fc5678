"""The ``marginops observe`` command: margins, collapse and class manifolds in training."""
