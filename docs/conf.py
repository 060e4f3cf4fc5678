"""Builds the documentation: ``sphinx-build -W -b html docs docs/_build``.

Nothing here needs a network, a compiler or a GPU: importing marginops compiles nothing.
"""

import sys
import typing
from pathlib import Path

import pyarrow.dataset  # noqa: F401 (it must not see the flag below, nor must pandas)
import torch.distributed  # noqa: F401 (likewise)
import torchmetrics  # noqa: F401 (likewise)
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The signatures name types that the sources import for type checkers only.
typing.TYPE_CHECKING = True
import marginops  # noqa: E402

typing.TYPE_CHECKING = False

project = "marginops"
release = version = marginops.__version__
html_title = f"marginops {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
exclude_patterns = ["_build"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 88

# Every reference of this project must resolve. Names of other libraries need not: resolving them
# would take their inventories from the network.
nitpicky = True
# Neither need the bases that our samplers share, nor what holds the files of a run.
nitpick_ignore_regex = [
    ("py:.*", r"(os|ignite|torch|torchmetrics|numpy|pyarrow|collections|pathlib|typing)\..*"),
    ("py:class", r"marginops\.training\.samplers\..*"),
    ("py:class", r"marginops\.scoring\.storage\..*"),
]

# Formulas are MathML, which browsers show without a script from the network.
html_math_renderer = "mathml"
# Commands that docutils does not know, and their equals among those that it knows.
KNOWN_COMMANDS = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)"}


def mathml(formula: str, as_block: bool) -> str:
    """The formula as an element of HTML."""
    for unknown, known in KNOWN_COMMANDS.items():
        formula = formula.replace(unknown, known)
    return tex2mathml(formula, as_block=as_block)


def visit_inline(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    """Write a formula within a sentence."""
    translator.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, which scrolls where it is too wide."""
    formula = mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what writes the formulas."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
