"""The kernels of update_dynamics: the bits of the reference, and wrong direct calls."""

import os

import pytest
import torch

from helpers.ops import OPS, implementation
from helpers.rounding import assert_same
from marginops.ops.dynamics import empty_state, update_dynamics_op

NATIVE = pytest.mark.skipif("MARGINOPS_DISABLE_JIT" in os.environ, reason="checked by the kernels")


def batch(rows, samples, device="cpu", dtype=torch.float32):
    numbers = torch.randn(5, rows, dtype=dtype, device=device) * 3
    numbers[:, ::17] = torch.inf
    flags = torch.rand(2, rows, device=device) < 0.7
    return torch.randint(samples, (rows,), device=device), *numbers, *flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_kernels_give_the_bits_of_the_reference(device, dtype, decay):
    """Also after thousands of visits, in which one fused product would show."""
    states = {which: empty_state(50, device) for which in ("native", "reference")}
    for _ in range(60):
        rows = batch(300, 50, device, dtype)
        for which, state in states.items():
            with implementation(which):
                update_dynamics_op(*state, *rows, decay)
    for one, other in zip(*states.values(), strict=True):
        assert_same(one, other)


def test_every_run_and_number_of_threads_gives_the_same_bits(device):
    runs = set()
    rows = [batch(5000, 700, device) for _ in range(3)]
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        state = empty_state(700, device)
        for one in rows:
            update_dynamics_op(*state, *one, 0.5)
        runs.add(tuple(value.cpu().numpy().tobytes() for value in state))
    assert len(runs) == 1


@NATIVE
@pytest.mark.parametrize("position", range(12))
def test_wrong_direct_calls(position):
    """Each argument in turn is too short, of another dtype, or of more dimensions."""
    right = [*empty_state(9), *batch(6, 9)]
    OPS.update_dynamics(*right, 0.5)
    name = OPS.update_dynamics.default._schema.arguments[position].name
    value = right[position]
    wrongs = [value.to(torch.int16), value.unsqueeze(-1), value[:-1]]
    if position < 4:
        wrongs.append(value.repeat_interleave(2, 0)[::2])
    for wrong in wrongs:
        arguments = [*right[:position], wrong, *right[position + 1 :], 0.5]
        with pytest.raises(RuntimeError, match=r"^\w+: expected"):
            OPS.update_dynamics(*arguments)
    two = [*right[:position], value.unsqueeze(-1), *right[position + 1 :], 0.5]
    with pytest.raises(RuntimeError, match=f"^{name}: expected"):
        OPS.update_dynamics(*two)
