"""``import marginops`` imports little, and every public module is an attribute of the package."""

import subprocess
import sys

import pytest

import marginops

MODULES = ("homogeneity", "metrics", "networks", "nn", "norms", "scoring", "training")


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


HOSTS = ("accelerate", "bokeh", "composer", "ignite", "lightning", "pytorch_lightning")
HOSTS += ("transformers", "trl", "peft", "datasets", "pandas", "pyarrow", "sklearn")
EXTRAS = (*HOSTS, "torchmetrics", "scipy", "matplotlib")
HEAVY = (*EXTRAS, "marginops.metrics", "marginops.training")


@pytest.mark.parametrize(
    ("imported", "left_out"),
    [
        ("marginops", HEAVY),
        ("marginops.training", EXTRAS),
        ("marginops.integrations", HEAVY),
        ("marginops.commands.cli", EXTRAS),
    ],
)
def test_import_leaves_out_what_few_need(imported: str, left_out: tuple[str, ...]) -> None:
    code = f"import sys, marginops, {imported}; dir(marginops)"
    code += f"; print([name for name in {left_out} if name in sys.modules])"
    assert python(code) == "[]\n"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_an_attribute_of_the_package(name: str) -> None:
    needed = {"metrics": "torchmetrics", "scoring": "pyarrow"}
    if name in needed:
        pytest.importorskip(needed[name])
    assert name in dir(marginops)
    code = f"import marginops; print(marginops.{name}.__name__, marginops.{name}.__all__ != [])"
    assert python(code) == f"marginops.{name} True\n"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'marginops' has no attribute 'trainin'"):
        getattr(marginops, "trainin")  # noqa: B009
