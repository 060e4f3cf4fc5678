"""The command ``marginops observe``: margins, neural collapse, class manifolds in training."""
