"""Tests that need a GPU: graphs, streams, launches, synchronisation, very large inputs."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import marginops
from helpers.kernels import FILES, declared
from helpers.ops import DTYPES, OPS
from marginops.ops.dynamics import empty_state, update_dynamics_op
from marginops.training import TrainingDynamics

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false"
)
DEVICE = "cuda:0"
SMALL_RUNS = (2, 10, 100, 1000, 40_000)  # classes

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(rows: int = 1280, classes: int = 100, dtype: torch.dtype = torch.float32) -> Inputs:
    logits = torch.randn(rows, classes, device=DEVICE).to(dtype)
    weight = torch.randn(classes, 64, device=DEVICE).to(dtype)
    target = torch.randint(classes, (rows,), device=DEVICE)
    return logits, weight, target, torch.tensor(0.5, device=DEVICE)


def softmax_statistics(f: Tensor, y: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """First a sum of the fields that have a gradient besides the margin, then all fields."""
    statistics = marginops.sample_statistics(f, y, input=f[..., :2], log_norm=n)
    return (statistics.loss + statistics.entropy + statistics.confidence, *statistics)


def tokens(values: Tensor) -> Tensor:
    """The rows as texts of five tokens, or of one."""
    return values.unflatten(0, (-1, 5 if len(values) % 5 == 0 else 1))


def dynamics(f: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The state of half as many samples as rows: each is in the batch twice."""
    samples = max(len(f) // 2, 1)
    state = empty_state(samples, f.device)
    seen = marginops.sample_statistics(f.detach(), y)
    update_dynamics_op(
        *(*state, torch.arange(len(f), device=f.device) % samples),
        *(seen.margin, seen.top2_margin, seen.loss, seen.confidence, seen.el2n),
        *(seen.correct, seen.counted, 0.5),
    )
    return tuple(state)


def moments(f: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, ...]:
    return marginops.class_moments(f[:, :70], y, f.shape[1], normalize=normalize)[1:]


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "margin": lambda f, w, y, n: (marginops.classification_margin(f, y, log_norm=n),),
    "score": lambda f, w, y, n: (marginops.minimal_margin_score(f, w),),
    "nearest": lambda f, w, y, n: (marginops.minimal_margin_score(f, w, rival="nearest"),),
    "logits": lambda f, w, y, n: (marginops.minimal_margin_score(f),),
    "probabilities": lambda f, w, y, n: (marginops.minimal_margin_score(f, softmax=True),),
    "statistics": lambda f, w, y, n: softmax_statistics(f, y, n),
    "tokens": lambda f, w, y, n: softmax_statistics(tokens(f)[:, :-1], tokens(y)[:, :-1], n),
    "token scores": lambda f, w, y, n: (
        marginops.minimal_margin_score(tokens(f)[:, :-1], w.detach()),
    ),
    "dynamics": lambda f, w, y, n: dynamics(f, y),
    "shard": lambda f, w, y, n: OPS.row_sums(f, y, True),
    "moments": lambda f, w, y, n: moments(f, y, False),
    "unit moments": lambda f, w, y, n: moments(f, y, True),
    "select": lambda f, w, y, n: marginops.select_smallest(f[:, 0], len(f) // 10),
    "select margin": lambda f, w, y, n: marginops.select_classification_margin(f, y, len(f) // 10),
    "select score": lambda f, w, y, n: marginops.select_minimal_margin(f, w, k=len(f) // 10),
    "select probabilities": lambda f, w, y, n: marginops.select_minimal_margin(
        f, k=len(f) // 10, softmax=True
    ),
}


def head_input(f: Tensor, w: Tensor) -> Tensor:
    """Features computed from the logits and the weight, so that they change with these."""
    return f @ w / 80


# Calls that multiply matrices too.
HEADS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "linear margin": lambda f, w, y, n: (
        marginops.linear_classification_margin(head_input(f, w), w, y),
    ),
    "linear score": lambda f, w, y, n: (
        marginops.linear_minimal_margin_score(head_input(f, w), w),
    ),
    "linear statistics": lambda f, w, y, n: marginops.linear_sample_statistics(
        head_input(f, w), w, y
    ),
    "log probabilities": lambda f, w, y, n: marginops.linear_log_prob(
        head_input(f, w), w, y, temperature=0.7, return_entropy=True
    ),
    "linear select": lambda f, w, y, n: marginops.linear_select_minimal_margin(
        head_input(f, w), w, k=len(f) // 10
    ),
    "linear select margin": lambda f, w, y, n: marginops.linear_select_classification_margin(
        head_input(f, w), w, y, k=len(f) // 10
    ),
    "regularization": lambda f, w, y, n: (
        marginops.multi_margin_regularization(head_input(f, w), w, y, logits=f),
    ),
}
ALL = CALLS | HEADS
DIFFERENTIABLE = [name for name in ALL if name not in ("dynamics", "shard", "select")]


def on_side_stream() -> torch.cuda.StreamContext:
    """A context with a new stream, which waits for the work that this one has been given."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def assert_same(
    name: str, values: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 0
) -> None:
    """Compare bit by bit, except matrix products: the vendor may compute these in several ways."""
    if name in HEADS:
        tolerance = 1e-4
    for value, wanted in zip(values, expected, strict=True):
        if tolerance == 0:
            assert torch.equal(value, wanted)
        elif value.is_floating_point():
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


def run_every_kernel(classes: int, dtype: torch.dtype) -> None:
    """Run small calls, forward and backward, and compare the forward results with the CPU's."""
    for rows in (1, 5, 3000, 20_000):
        if rows * classes > 5_000_000:
            continue
        logits, weight, target, log_norm = make_inputs(rows, classes, dtype)
        log_norm = log_norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = [
            value.cpu()
            for call in CALLS.values()
            for value in call(logits.cpu(), weight.cpu(), target.cpu(), log_norm.cpu())
        ]
        actual = [
            value.cpu()
            for call in CALLS.values()
            for value in call(logits, weight, target, log_norm)
        ]
        for value, wanted in zip(actual, expected, strict=True):
            if not value.is_floating_point():
                continue
            torch.testing.assert_close(value, wanted, rtol=3e-5, atol=1e-5, equal_nan=True)
        logits.requires_grad_()
        weight.requires_grad_()
        for name in CALLS:
            if name in DIFFERENTIABLE:
                CALLS[name](logits, weight, target, log_norm)[0].sum().backward()
        pair = torch.randint(classes, (rows, 2), device=DEVICE)
        distance = OPS.pair_distance(weight.detach(), None, pair)
        wanted = OPS.pair_distance(weight.detach().cpu(), None, pair.cpu())
        torch.testing.assert_close(distance.cpu(), wanted, rtol=1e-5, atol=1e-6)
        sources = torch.randint(rows, (rows,), device=DEVICE)
        key = (target * rows + sources).sort().values
        coefficient = torch.ones_like(distance)
        features = torch.randn(rows, 70, device=DEVICE).to(dtype)
        total = OPS.class_sum(key, coefficient, features, classes)
        wanted = OPS.class_sum(key.cpu(), coefficient.cpu(), features.cpu(), classes)
        torch.testing.assert_close(total.cpu(), wanted, rtol=1e-4, atol=1e-3)
    wide = torch.randn(200, 2100, device=DEVICE).to(dtype), torch.arange(200, device=DEVICE) % 7
    actual = marginops.class_moments(*wide, 7, normalize=True)
    expected = marginops.class_moments(wide[0].cpu(), wide[1].cpu(), 7, normalize=True)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.cpu(), wanted, rtol=3e-5, atol=1e-5)
    large = torch.randn(200_000, device=DEVICE).to(dtype)
    chosen = marginops.select_smallest(large, 50_000)
    assert torch.equal(chosen.indices, torch.sort(large, stable=True).indices[:50_000])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SMALL_RUNS)
def test_every_kernel(classes, dtype):
    """``benchmarks/gpu_check.sh`` runs this test under the sanitizer tools."""
    run_every_kernel(classes, dtype)


def test_small_runs_launch_every_kernel():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for classes in SMALL_RUNS:
            run_every_kernel(classes, torch.float32)
        torch.cuda.synchronize()
    names = " ".join(event.name for event in profile.events())
    launched = set(re.findall(r"marginops::cuda::(\w+_kernel)", names))
    assert launched == set().union(*map(declared, FILES))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1280, 300_000])
def test_graph_replays_on_fresh_inputs(name, rows):
    call = ALL[name]
    inputs = make_inputs(rows, 10)
    with on_side_stream():
        call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for _ in range(3):
        for value, fresh in zip(inputs, make_inputs(rows, 10), strict=True):
            value.copy_(fresh)
        graph.replay()
        assert_same(name, captured, call(*inputs))


def test_every_replay_is_a_step_of_the_dynamics():
    """The op reads the number of the step on the device."""
    logits, _, target, _ = make_inputs(300, 10)
    indices = torch.arange(300, device=DEVICE) % 150
    captured, plain, other = (TrainingDynamics(150, device=DEVICE) for _ in range(3))
    with on_side_stream():
        other.update(indices, logits, target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(indices, logits, target)
    for _ in range(3):
        fresh, _, classes, _ = make_inputs(300, 10)
        logits.copy_(fresh)
        target.copy_(classes)
        graph.replay()
        plain.update(indices, logits, target)
    assert captured.num_updates == 3
    for name, value in captured.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, plain.state_dict()[name]), name


def gradients(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = tuple(value.detach().requires_grad_() for value in inputs[:2])
    result = ALL[name](*leaves, *inputs[2:])[0]
    return torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_graph_replays_gradients(name):
    inputs = make_inputs()
    with on_side_stream():
        gradients(name, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(name, inputs)
    for value, fresh in zip(inputs, make_inputs(), strict=True):
        value.copy_(fresh)
    graph.replay()
    assert_same(name, captured, gradients(name, inputs))


@pytest.mark.parametrize("name", ALL)
def test_side_stream(name):
    with on_side_stream():
        inputs = make_inputs(50_000, 1000)
        actual = ALL[name](*inputs)
        torch.cuda.current_stream().synchronize()
    assert_same(name, actual, ALL[name](*inputs))


@pytest.mark.parametrize("name", HEADS)
def test_autocast_is_the_product_in_bfloat16(name):
    logits, weight, target, log_norm = make_inputs()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = HEADS[name](logits, weight, target, log_norm)
    half = logits.bfloat16(), weight.bfloat16(), target, log_norm
    for value, wanted in zip(actual, HEADS[name](*half), strict=True):
        if value.is_floating_point():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_not_change_logits(name):
    inputs = make_inputs()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = CALLS[name](*inputs)
    assert_same(name, actual, CALLS[name](*inputs))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1280, 300_000])
def test_no_host_synchronisation(name, rows):
    inputs = make_inputs(rows, 10)
    inputs[0].requires_grad_()
    ALL[name](*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = ALL[name](*inputs)[0]
        if result.requires_grad:
            result.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("name", ["shard", "select margin", "select score", "select probabilities"])
def test_at_most_two_launches_for_a_batch(name, classes):
    inputs = make_inputs(1280, classes)
    CALLS[name](*inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        CALLS[name](*inputs)
        torch.cuda.synchronize()
    launches = [event for event in profile.events() if "Sync" not in event.name]
    device = [e.name for e in launches if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(device) <= 2, device


@pytest.mark.parametrize("name", ALL)
def test_reduce_overhead(name):
    torch.compiler.reset()
    compiled = torch.compile(ALL[name], fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = make_inputs()
        actual = [value.clone() for value in compiled(*inputs)]
        # The compiler generates the norm of a sample's features.
        tolerance = 1e-6 if name == "statistics" else 0
        assert_same(name, actual, ALL[name](*inputs), tolerance)


def test_more_elements_than_32_bits():
    rows, classes = 2_200_000, 1000
    logits = torch.randn(rows, classes, device=DEVICE, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    target = torch.randint(classes, (rows,), device=DEVICE)
    margin = marginops.classification_margin(logits, target)
    last = slice(rows - 1000, rows)
    assert torch.equal(margin[last], marginops.classification_margin(logits[last], target[last]))


def test_wrong_target_is_a_device_side_assertion():
    program = (
        "import torch, marginops\n"
        "logits = torch.randn(4, 3, device='cuda:0')\n"
        "marginops.classification_margin(logits, torch.full((4,), 3, device='cuda:0'))\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
