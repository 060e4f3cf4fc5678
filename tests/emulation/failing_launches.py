"""Wrong values in arguments fail a launch by name. op_tests.py runs this on emulated kernels."""

from typing import Any

import pytest
import torch

from helpers.emulation import every_op

CASE = every_op.Case(4, 7, 3, torch.float32, "padded", "normal", 1)
OPS = every_op.ops()
# They see some of the classes, and a target that is not among these belongs to others.
OF_SHARDS = {"row_sums", "sample_statistics_gradient"}


def ops_with(argument: str) -> list[str]:
    found = [name for name, op in OPS.items() if argument in every_op.arguments(op, CASE)]
    assert found, f"no op has an argument {argument}"
    return sorted({*found} - OF_SHARDS)


def assert_fails(name: str, **wrong: Any) -> None:
    right = every_op.arguments(OPS[name], CASE)
    with pytest.raises(RuntimeError, match=r"block \(\d+,0,0\) thread .*: assertion failed"):
        OPS[name](*{**right, **wrong}.values())
    OPS[name](*right.values())


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
@pytest.mark.parametrize("name", ops_with("target"))
def test_target_is_no_class(name: str, wrong: int) -> None:
    assert_fails(name, target=torch.full((4,), wrong))


@pytest.mark.parametrize("wrong", [-1, 49, 2**40])
def test_key_is_of_no_class(wrong: int) -> None:
    """For pair_gradient it is none of the entries of any class, and so is not read."""
    key = torch.tensor([0, 7, wrong]).sort().values
    assert_fails("class_sum", key=key, coefficient=torch.ones(3))


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_index_of_no_sample(wrong: int) -> None:
    assert_fails("update_dynamics", indices=torch.tensor([0, 6, wrong, 1]))


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
@pytest.mark.parametrize("name", ops_with("pair"))
def test_pair_has_no_class(name: str, wrong: int) -> None:
    assert_fails(name, pair=torch.tensor([[0, 1], [2, wrong]]))
