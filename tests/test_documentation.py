"""The README's examples run, its operator table matches the code, and docstrings' examples hold."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import marginops

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)


def test_the_one_line_is_the_lines_it_replaces():
    before, after, *_ = blocks()
    names = {"marginops": marginops, "logits": torch.randn(640, 10), "weight": torch.randn(10, 32)}
    exec(before, names)
    scores, indices = names["scores"], names["indices"]
    exec(after, names)
    assert torch.equal(names["indices"], indices)
    torch.testing.assert_close(names["scores"], scores)


def test_further_examples_run():
    for block in blocks()[2:]:
        exec(block, {})


def test_operator_table_has_every_op_with_its_signature():
    written = re.findall(r"^\| `(\w+)\((.*?)\)` \|", README.read_text(), re.M)
    functions = [name for name in marginops.__all__ if inspect.isfunction(getattr(marginops, name))]
    assert sorted(name for name, _ in written) == sorted(functions)
    for name, parameters in written:
        signature = inspect.signature(getattr(marginops, name))
        bare = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ]
        expected = str(signature.replace(parameters=bare, return_annotation=signature.empty))
        assert f"({parameters})" == expected.replace("'", '"')


PACKAGE = Path(marginops.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples(module):
    names = {"torch": torch, "marginops": marginops}
    failed, attempted = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert attempted > 0
    assert failed == 0
