"""Logits [..., C] and features [..., D] give what their rows give, in the shape of the rows."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, func
from torch._dynamo.testing import CompileCounterWithBackend

import marginops
from helpers.rounding import assert_same
from marginops.ops import margin, statistics
from marginops.ops.rows import row_layout

BATCH, LENGTH, CLASSES, COLUMNS = 5, 6, 7, 3
Views = dict[str, Callable[[Tensor], Tensor]]

# Views of [BATCH, LENGTH, ...]: which are read without a copy, and which need one.
WITHOUT_COPY: Views = {
    "contiguous": lambda x: x,
    "first tokens left out": lambda x: x[:, 1:],
    "last token left out": lambda x: x[:, :-1],
    "middle": lambda x: x[:, 1:-2],
    "one sequence": lambda x: x[:1, 2:],
    "every other sequence": lambda x: x[::2, ::2],
    "time first": lambda x: x.transpose(0, 1),
    "time first, last token left out": lambda x: x[:, :-1].transpose(0, 1),
    "four dimensions": lambda x: x[None, :, None, :-1],
    "one position": lambda x: x[:, 2:3],
}
WITH_COPY: Views = {
    "few tokens": lambda x: x[:, :2],
    "expanded": lambda x: x[:, None].expand(-1, 2, *x.shape[1:]),
    "overlapping": lambda x: x.unfold(0, 3, 1).movedim(-1, 1),
}
EMPTY: Views = {
    "no sequence": lambda x: x[:0],
    "no token": lambda x: x[:, :0],
}
ALL = WITHOUT_COPY | WITH_COPY | EMPTY


@pytest.fixture(params=ALL)
def view(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return ALL[request.param]


def tokens(device, dtype=torch.float32, columns=COLUMNS) -> dict[str, Tensor]:
    target = torch.randint(CLASSES, (BATCH, LENGTH))
    target[1:3, 2] = -100
    floating = {
        "logits": torch.randn(BATCH, LENGTH, CLASSES).mul(2).round(),
        "input": torch.randint(-2, 3, (BATCH, LENGTH, columns)).float(),
    }
    moved = {name: value.to(device, dtype) for name, value in floating.items()}
    return moved | {"target": target.to(device)}


def layer(device, dtype=torch.float32) -> dict[str, Tensor]:
    weight, bias = torch.randint(-2, 3, (CLASSES, COLUMNS)), torch.randint(-2, 3, (CLASSES,))
    return {"weight": weight.to(device, dtype), "bias": bias.to(device, dtype)}


def _linear(name: str) -> Callable[[dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, ...]]:
    def call(x: dict[str, Tensor], layer: dict[str, Tensor]) -> tuple[Tensor, ...]:
        labels = {} if name == "minimal_margin_score" else {"target": x["target"]}
        options = {"return_entropy": True, "temperature": 2.0} if name == "log_prob" else {}
        result = getattr(marginops, f"linear_{name}")(x["input"], **layer, **labels, **options)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return call


CALLS: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, ...]]] = {
    "margin": lambda x, _: (
        marginops.classification_margin(x["logits"], x["target"], log_norm=0.5),
    ),
    "score": lambda x, layer: (marginops.minimal_margin_score(x["logits"], layer["weight"]),),
    "probabilities": lambda x, _: (marginops.minimal_margin_score(x["logits"], softmax=True),),
    "statistics": lambda x, _: marginops.sample_statistics(
        x["logits"], x["target"], input=x["input"], log_norm=0.5
    ),
    "ignored class": lambda x, _: marginops.sample_statistics(
        x["logits"], x["target"].clamp(min=0), ignore_index=0
    )[:8],
    **{
        f"linear {name}": _linear(name)
        for name in ("classification_margin", "minimal_margin_score", "sample_statistics")
    },
    "linear log_prob": _linear("log_prob"),
}


def rows_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows as matrices of their own."""
    target = x["target"].reshape(-1)
    return {
        name: target if name == "target" else value.reshape(len(target), value.shape[-1]).clone()
        for name, value in x.items()
    }


def viewed(x: dict[str, Tensor], view: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    changed = {name: view(value) for name, value in x.items()}
    # A target has one dimension less. It is viewed with one, so that it has the same layout.
    return changed | {"target": view(x["target"][..., None]).squeeze(-1)}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_rows(device, dtype, name, view):
    x, head = viewed(tokens(device, dtype), view), layer(device, dtype)
    for actual, expected in zip(CALLS[name](x, head), CALLS[name](rows_of(x), head), strict=True):
        assert actual.shape == x["target"].shape
        assert actual.is_contiguous()
        assert_same(actual.reshape(-1), expected)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_the_rows(device, name, view):
    x, head = tokens(device, torch.float64), layer(device, torch.float64)
    leaves = [value.requires_grad_() for value in (x["logits"], x["input"], *head.values())]

    def gradients(change):
        results = [v for v in CALLS[name](change(viewed(x, view)), head) if v.requires_grad]
        total = sum(
            (
                torch.where(v.isinf(), 0, v).reshape(-1) * torch.arange(v.numel(), device=device)
            ).sum()
            for v in results
        )
        return torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)

    torch.testing.assert_close(gradients(lambda x: x), gradients(rows_of))


@pytest.mark.parametrize("name", ["margin", "score", "probabilities", "statistics"])
@pytest.mark.parametrize("layout", ALL)
def test_logits_are_copied_only_where_no_view_is_possible(monkeypatch, name, layout):
    x, head = viewed(tokens("cpu"), ALL[layout]), layer("cpu")
    seen: list[Tensor] = []

    def record(op):
        return lambda logits, *others: (seen.append(logits), op(logits, *others))[1]

    for module, op in (
        (margin, "classification_margin_op"),
        (margin, "minimal_margin_score_op"),
        (statistics, "sample_statistics_op"),
    ):
        monkeypatch.setattr(module, op, record(getattr(module, op)))
    CALLS[name](x, head)
    (matrix,) = seen
    is_view = matrix.untyped_storage().data_ptr() == x["logits"].untyped_storage().data_ptr()
    assert is_view == (layout not in WITH_COPY)
    assert len(matrix) <= 2 * x["target"].numel()


def test_rows_that_are_left_out_have_no_part_in_anything(device):
    x, head = tokens(device, torch.float64), layer(device, torch.float64)
    clean = {name: value.clone() for name, value in x.items()}
    x["logits"][:, -1] = math.nan
    x["target"][:, -1] = CLASSES + 3  # no class
    log_norm = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    head["weight"].requires_grad_()

    def results(x):
        logits = x["logits"].clone().requires_grad_()
        shifted, target = logits[:, :-1], x["target"][:, :-1]
        seen = marginops.sample_statistics(shifted, target, log_norm=log_norm)
        score = marginops.minimal_margin_score(shifted, head["weight"])
        mean = seen.mean_loss()
        total = mean + torch.where(seen.margin.isinf(), 0, seen.margin).sum() + score.sum()
        return *seen[:8], mean, *torch.autograd.grad(total, (logits, head["weight"], log_norm))

    for actual, expected in zip(results(x), results(clean), strict=True):
        assert_same(actual.detach(), expected.detach())
        assert not actual.isnan().any()


def test_a_row_that_is_in_a_view_twice_may_have_two_targets(device):
    logits = tokens(device)["logits"].unfold(0, 3, 1).movedim(-1, 1)
    target = torch.arange(logits[..., 0].numel(), device=device).view(logits.shape[:-1]) % CLASSES
    statistics = marginops.sample_statistics(logits, target)
    expected = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    torch.testing.assert_close(statistics.loss, expected)


def test_mean_loss_is_that_of_torch(device):
    x = tokens(device, torch.float64)
    logits = x["logits"].requires_grad_()
    for view in (WITHOUT_COPY["contiguous"], WITHOUT_COPY["last token left out"]):
        shown, target = view(logits), view(x["target"])
        statistics = marginops.sample_statistics(shown, target)
        expected = F.cross_entropy(shown.movedim(-1, 1), target)
        torch.testing.assert_close(statistics.mean_loss(), expected)
        mean, _ = getattr(statistics.loss, "_marginops_mean")  # noqa: B009
        assert statistics.mean_loss() is mean
        torch.testing.assert_close(
            torch.autograd.grad(statistics.mean_loss(), logits),
            torch.autograd.grad(expected, logits),
        )


def test_images_are_moved_to_class_last(device):
    logits = torch.randn(2, CLASSES, 3, 4, device=device)
    target = torch.randint(CLASSES, (2, 3, 4), device=device)
    moved = logits.movedim(1, -1)
    statistics = marginops.sample_statistics(moved, target)
    torch.testing.assert_close(statistics.loss, F.cross_entropy(logits, target, reduction="none"))
    last = logits.to(memory_format=torch.channels_last).movedim(1, -1)
    assert row_layout(last).matrix(last).data_ptr() == last.data_ptr()
    assert_same(tuple(marginops.sample_statistics(last, target)[:8]), tuple(statistics[:8]))


@given(data=st.data())
def test_any_view(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    base = torch.arange(math.prod(sizes) * 3, dtype=torch.float64).sin().view(*sizes, 3)
    logits = base.permute(*data.draw(st.permutations(range(len(sizes)))), len(sizes))
    for dim in range(len(sizes)):
        size = logits.shape[dim]
        start, stop = (data.draw(st.integers(0, size)) for _ in range(2))
        logits = logits[(slice(None),) * dim + (slice(start, stop, data.draw(st.integers(1, 3))),)]
    if data.draw(st.booleans()):
        logits = logits[..., ::2]
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    actual = marginops.sample_statistics(logits, target)
    expected = marginops.sample_statistics(
        logits.reshape(-1, logits.shape[-1]).contiguous(), target.reshape(-1)
    )
    for one, other in zip(actual[:8], expected[:8], strict=True):
        assert one.shape == target.shape
        assert_same(one.reshape(-1), other)


def everything(logits, input, weight, bias, target):
    x = {"logits": logits, "input": input, "target": target}
    results = [v for call in CALLS.values() for v in call(x, {"weight": weight, "bias": bias})]
    finite = [torch.where(v.isinf(), 0, v).sum() for v in results if v.requires_grad]
    return results, sum(finite)


@pytest.mark.parametrize("shift", [False, True])
def test_compile_full_graph_with_dynamic_shapes(device, shift):
    def step(logits, input, weight, bias, target):
        if shift:
            logits, input, target = logits[:, :-1], input[:, :-1], target[:, 1:]
        return everything(logits, input, weight, bias, target)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((2, 4), (3, 5), (5, 6)):
        x = {name: v[:batch, :length].clone() for name, v in tokens(device, torch.float64).items()}
        head = layer(device, torch.float64)
        leaves = [v.requires_grad_() for v in (x["logits"], x["input"], *head.values())]
        (actual, loss), (expected, wanted) = (f(*leaves, x["target"]) for f in (compiled, step))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves)
        )
    assert counter.frame_count == 1


def test_transforms_of_torch_func(device):
    x = tokens(device, torch.float64)

    def losses(logits, target):
        return marginops.sample_statistics(logits[:, :-1], target[:, 1:]).loss

    ensemble = torch.stack([x["logits"], x["logits"].flip(0)])
    mapped = func.vmap(losses, (0, None))(ensemble, x["target"])
    for actual, logits in zip(mapped, ensemble, strict=True):
        assert_same(actual, losses(logits, x["target"]))
    gradient = func.grad(lambda logits: losses(logits, x["target"]).sum())(x["logits"])
    leaf = x["logits"].clone().requires_grad_()
    torch.testing.assert_close(
        gradient, torch.autograd.grad(losses(leaf, x["target"]).sum(), leaf)[0]
    )


def test_second_derivatives_of_a_slice(device):
    logits = torch.randn(3, 4, CLASSES, dtype=torch.float64, device=device, requires_grad=True)
    weight = layer(device, torch.float64)["weight"] + torch.eye(CLASSES, COLUMNS, device=device)

    def score(logits):
        return marginops.minimal_margin_score(logits[:, 1:].square(), weight)

    assert torch.autograd.gradgradcheck(score, logits)


def test_gradient_of_a_slice_may_lie_in_any_way(device):
    logits = torch.randn(3, 4, CLASSES, device=device, requires_grad=True)
    part = logits[:, 1:]
    matrix = row_layout(part).matrix(part)
    gradient = torch.randn(CLASSES, len(matrix), device=device).t()
    (actual,) = torch.autograd.grad(matrix, logits, gradient)
    rows = gradient[[0, 1, 2, 4, 5, 6, 8, 9, 10]].reshape(3, 3, CLASSES)
    assert torch.equal(actual[:, 1:], rows)
    assert not actual[:, 0].any()


LOGITS, TARGET = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: marginops.sample_statistics(LOGITS, TARGET.flatten()),
            r"target: expected shape \[3, 4\] for logits .*\[12\]; pass target\.reshape\(3, 4\)$",
        ),
        (
            lambda: marginops.classification_margin(LOGITS, TARGET[:, 1:]),
            r"target: expected shape \[3, 4\] for logits \[3, 4, 5\], got \[3, 3\]$",
        ),
        (
            lambda: marginops.sample_statistics(LOGITS, torch.zeros(3, 5, dtype=torch.int64)),
            r"target: .* got \[3, 5\]; if dimension 1 .*, pass logits\.movedim\(1, -1\)$",
        ),
        (
            lambda: marginops.sample_statistics(LOGITS, torch.zeros_like(LOGITS).long()),
            r"target: .* got \[3, 4, 5\]; if .* one-hot, pass target\.argmax\(-1\)$",
        ),
        (
            lambda: marginops.sample_statistics(LOGITS, TARGET, input=torch.ones(12, 2)),
            r"input: expected \[3, 4\] rows for logits \[3, 4, 5\], got shape \[12, 2\]$",
        ),
        (
            lambda: marginops.sample_statistics(LOGITS, TARGET, input=torch.ones(3, 3, 2)),
            r"input: expected \[3, 4\] rows for logits \[3, 4, 5\], got shape \[3, 3, 2\]$",
        ),
        (
            lambda: marginops.sample_statistics(LOGITS[0, 0], TARGET[0, 0]),
            r"logits: expected shape \[\.\.\., N, C\], got \[5\]; .* logits\.unsqueeze\(0\)$",
        ),
        (
            lambda: marginops.minimal_margin_score(LOGITS[..., :1]),
            r"logits: expected at least 2 classes .* got \[3, 4, 1\]; .* z = logits\.squeeze\(-1\)",
        ),
        (
            lambda: marginops.minimal_margin_score(LOGITS, torch.ones(4, 2)),
            r"weight: expected 5 rows for logits \[3, 4, 5\], got shape \[4, 2\]$",
        ),
        (
            lambda: marginops.linear_sample_statistics(LOGITS, torch.ones(2, 5), TARGET[0]),
            r"target: expected shape \[3, 4\] for input \[3, 4, 5\], got \[4\]$",
        ),
        (
            lambda: marginops.linear_minimal_margin_score(LOGITS, torch.ones(2, 20)),
            r"input: expected 20 columns .* got shape \[3, 4, 5\]; pass input\.flatten\(1\) if",
        ),
        (
            lambda: marginops.linear_select_minimal_margin(LOGITS, torch.ones(2, 5), k=1),
            r"input: expected shape \[N, D\], got \[3, 4, 5\]; .* input\.flatten\(0, -2\)",
        ),
        (
            lambda: marginops.select_minimal_margin(LOGITS, k=1),
            r"logits: expected shape \[N, C\], got \[3, 4, 5\]; pass logits\.flatten\(0, -2\)",
        ),
    ],
)
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        (TARGET.int(), "pass target.long()"),
        (TARGET.float(), "if these are class indices, pass target.long()"),
        (TARGET.int().flatten(), "pass target.reshape(3, 4).long()"),
        (torch.ones(3, 4, 5), "if its last dimension is one-hot, pass target.argmax(-1)"),
        (
            torch.ones(3, 4, 5, dtype=torch.bool),
            "if its last dimension is one-hot, pass target.long().argmax(-1)",
        ),
    ],
)
def test_targets_of_a_wrong_dtype(target, advice):
    with pytest.raises(TypeError, match=f"^target: expected dtype .*; {re.escape(advice)}$"):
        marginops.classification_margin(LOGITS, target)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
@pytest.mark.parametrize("logits", [LOGITS, LOGITS[0]], ids=["tokens", "samples"])
def test_ignore_index_that_is_no_int64(logits, value):
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^ignore_index: expected .* int64, got -?92"):
        marginops.sample_statistics(logits, target, ignore_index=value)
    for limit in (2**63 - 1, -(2**63)):
        marginops.sample_statistics(logits, target, ignore_index=limit)


def test_probabilities_of_tokens_give_a_warning(monkeypatch):
    monkeypatch.setattr("marginops.ops.arguments._looks", 16)
    with pytest.warns(UserWarning, match="look like probabilities") as seen:
        marginops.sample_statistics(LOGITS.softmax(-1), TARGET)
    assert [warning.filename for warning in seen] == [__file__]
