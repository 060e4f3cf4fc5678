"""The op that folds a batch into the state of TrainingDynamics, against a plain NumPy twin."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.dynamics_twin import Twin
from helpers.ops import IMPLEMENTATIONS, OPS, implementation, opcheck
from helpers.rounding import assert_same
from marginops.ops.dynamics import DynamicsState, empty_state, update_dynamics_op

SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45]


@st.composite
def histories(draw):
    """The number of samples, a decay, and batches: indices and the seven fields of their rows."""
    samples = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batches = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(0, 12))
        numbers = torch.randn(5, rows, generator=random, dtype=dtype) * 3
        places = st.tuples(st.integers(0, 4), st.integers(0, max(rows - 1, 0)))
        for place in draw(st.lists(places, max_size=4 if rows else 0)):
            numbers[place] = draw(st.sampled_from([*SPECIAL, 1e300 if dtype.itemsize == 8 else 1]))
        indices = torch.randint(samples, (rows,), generator=random)
        correct = torch.rand(rows, generator=random) < 0.5
        counted = torch.rand(rows, generator=random) < draw(st.sampled_from([0.7, 1.0]))
        batches.append((indices, *numbers.unbind(), correct, counted))
    return samples, draw(st.sampled_from([0.0, 0.5, 0.9])), batches


def on(device, tensors):
    return [value.to(device) for value in tensors]


def assert_state(state, twin):
    """Integers and the values of the last visit are equal; means may round differently."""
    values, *integers = (torch.from_numpy(array) for array in twin.state())
    actual, *actual_integers = (value.cpu() for value in state)
    for one, other in zip(actual_integers, integers, strict=True):
        assert_same(one, other)
    assert_same(actual[:, :3], values[:, :3])
    torch.testing.assert_close(actual[:, 3:], values[:, 3:], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(history=histories())
def test_the_state_is_that_of_the_twin(device, which, history):
    samples, decay, batches = history
    state, twin = empty_state(samples, device), Twin(samples, decay)
    with np.errstate(all="ignore"), implementation(which):
        for batch in batches:
            assert update_dynamics_op(*state, *on(device, batch), decay) is None
            twin.update(*(value.tolist() for value in batch))
            assert_state(state, twin)


def batch_of(rows, samples, device="cpu", dtype=torch.float32):
    """A batch with repeated ids, rows that do not count, and a NaN."""
    margin, score, loss, el2n = torch.randn(4, rows, dtype=dtype, device=device)
    margin[rows // 2] = math.nan
    return (
        *(torch.randint(samples, (rows,), device=device), margin, score, loss),
        *(torch.rand(rows, dtype=dtype, device=device), el2n),
        *(torch.rand(2, rows, device=device) < 0.8),
    )


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("samples", [1, 300, 10**6])
def test_large_batches_and_large_steps(device, which, samples):
    state, twin = empty_state(samples, device), Twin(samples, 0.5)
    state.totals[0] = twin.step = 2**30  # a step that needs the upper half of a key
    with np.errstate(all="ignore"), implementation(which):
        for _ in range(2):
            batch = batch_of(5000, samples, device)
            update_dynamics_op(*state, *batch, 0.5)
            twin.update(*(value.tolist() for value in batch))
    assert_state(state, twin)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_strides_do_not_matter(device, which):
    batch = batch_of(70, 20, device, torch.float64)
    spread = [torch.stack((value, value), 1)[:, 0] for value in batch]
    states = empty_state(20, device), empty_state(20, device)
    with implementation(which):
        for state, arguments in zip(states, (batch, spread), strict=True):
            for _ in range(3):
                update_dynamics_op(*state, *arguments, 0.5)
    for one, other in zip(*states, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**63)])
def test_an_index_out_of_range_changes_nothing(which, wrong):
    state, batch = empty_state(5), batch_of(8, 5)
    with implementation(which):
        update_dynamics_op(*state, *batch, 0.5)
        before = [value.clone() for value in state]
        batch[0][6] = wrong
        with pytest.raises(
            RuntimeError, match=rf"indices: expected values in \[0, 5\), got {wrong}"
        ):
            update_dynamics_op(*state, *batch, 0.5)
    for one, other in zip(state, before, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_an_empty_batch_is_a_step_and_no_samples_take_no_row(device, which):
    with implementation(which):
        for samples in (0, 3):
            state = empty_state(samples, device)
            update_dynamics_op(*state, *(value[:0] for value in batch_of(4, 9, device)), 0.5)
            assert state.totals.tolist() == [1, 0]
            assert (state.last_seen == -1).all() and not state.values.any()
    with implementation(which), pytest.raises(RuntimeError, match=r"indices: expected values in"):
        update_dynamics_op(*empty_state(0), *batch_of(4, 9), 0.5)


def test_opcheck_and_one_graph(device):
    batch = batch_of(12, 7, device)
    opcheck("update_dynamics", *empty_state(7, device), *batch, 0.5)

    def update(*arguments):
        update_dynamics_op(*arguments, 0.5)
        return arguments[1] * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled, state = empty_state(7, device), empty_state(7, device)
    doubled = torch.compile(update, backend=counter, fullgraph=True)(*compiled, *batch)
    assert counter.frame_count == 1
    update(*state, *batch)
    for one, other in zip(compiled, state, strict=True):
        assert_same(one, other)
    assert torch.equal(doubled, state.counts * 2)


def test_a_gradient_is_refused():
    batch = list(batch_of(4, 9))
    batch[3] = batch[3].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"update_dynamics: expected arguments that do"):
        OPS.update_dynamics(*empty_state(9), *batch, 0.5)


def test_every_run_gives_the_same_bits(device):
    batch = batch_of(4000, 50, device)
    states = []
    for threads in (1, 4, 1):
        torch.set_num_threads(threads)
        states.append(empty_state(50, device))
        for _ in range(3):
            update_dynamics_op(*states[-1], *batch, 0.9)
    for state in states[1:]:
        for one, other in zip(state, states[0], strict=True):
            assert_same(one, other)
    assert isinstance(state, DynamicsState)
