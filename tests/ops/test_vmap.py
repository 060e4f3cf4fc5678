"""``torch.vmap`` gives what a loop gives, from one call of an op for all elements of the batch."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, func

import marginops
from marginops.ops.margin_pair import classification_margin_rival_op, minimal_margin_pair_op

BATCH, ROWS, CLASSES, COLUMNS = 5, 7, 4, 6
IGNORED = -100


def example(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments that all have a batch in front: rows that are ignored, ties, NaN, infinities."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    target = torch.randint(0, CLASSES, (BATCH, ROWS), generator=generator)
    target[0, 1] = target[2, :3] = target[4] = IGNORED
    logits = random(ROWS, CLASSES)
    logits[1, 2] = 1.0
    logits[2, 4, 1], logits[3, 5, 0] = torch.nan, torch.inf
    values = {
        "logits": logits,
        "input": random(ROWS, COLUMNS),
        "weight": random(CLASSES, COLUMNS),
        "bias": random(CLASSES),
    }
    # The last norm is so large that the margins become 0.
    log_norm = torch.tensor([0.0, 0.5, -1.0, 2.0, 3000.0], dtype=torch.float64)
    return {
        **{name: value.to(dtype) for name, value in values.items()},
        "target": target,
        "log_norm": log_norm.to(torch.float64 if dtype == torch.float64 else torch.float32),
    }


def loop(function: Callable[..., Any], arguments: Sequence[Tensor], dims: Sequence[Any]) -> Any:
    """What ``func.vmap(function, dims)`` has to give."""
    results = [
        function(
            *(
                value if dim is None else value[index]
                for value, dim in zip(arguments, dims, strict=True)
            )
        )
        for index in range(BATCH)
    ]
    if torch.is_tensor(results[0]):
        return torch.stack(results)
    return tuple(map(torch.stack, zip(*results, strict=True)))


def fields(statistics: marginops.SampleStatistics, *more: Tensor) -> tuple[Tensor, ...]:
    return *(value for value in statistics if value is not None), *more


# The names of the arguments, and the function of them.
CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "classification_margin": (
        ("logits", "target", "log_norm"),
        lambda x, t, n: marginops.classification_margin(x, t, log_norm=n),
    ),
    "minimal_margin_score": (
        ("logits", "weight", "bias"),
        lambda x, w, b: marginops.minimal_margin_score(x, w, b, bias_in_norm=True),
    ),
    "nearest": (
        ("logits", "weight"),
        lambda x, w: marginops.minimal_margin_score(x, w, rival="nearest"),
    ),
    "softmax": (("logits",), lambda x: marginops.minimal_margin_score(x, softmax=True)),
    "sample_statistics": (
        ("logits", "target", "input", "log_norm"),
        lambda x, t, h, n: fields(marginops.sample_statistics(x, t, input=h, log_norm=n)),
    ),
    "without input": (
        ("logits", "target"),
        lambda x, t: fields(marginops.sample_statistics(x, t)),
    ),
    "linear_classification_margin": (
        ("input", "weight", "target", "bias", "log_norm"),
        lambda h, w, t, b, n: marginops.linear_classification_margin(h, w, t, b, log_norm=n),
    ),
    "linear_minimal_margin_score": (
        ("input", "weight", "bias"),
        lambda h, w, b: marginops.linear_minimal_margin_score(h, w, b, bias_in_norm=True),
    ),
    "linear_sample_statistics": (
        ("input", "weight", "target", "bias", "log_norm"),
        lambda h, w, t, b, n: fields(marginops.linear_sample_statistics(h, w, t, b, log_norm=n)),
    ),
    # Two rows of logits fit into the buffer, and fewer into that of the gradient.
    "several tiles": (
        ("input", "weight", "target"),
        lambda h, w, t: fields(
            marginops.linear_sample_statistics(h, w, t, chunk_bytes=2 * CLASSES * 8)
        ),
    ),
    "several elements in a tile": (
        ("input", "weight", "target", "bias"),
        lambda h, w, t, b: fields(
            marginops.linear_sample_statistics(h, w, t, b, chunk_bytes=4 * ROWS * CLASSES * 8)
        ),
    ),
}
# For each call, every choice of the arguments that differ between the elements of the batch.
CASES = [
    (name, dims)
    for name, (arguments, _) in CALLS.items()
    for dims in itertools.product((0, None), repeat=len(arguments))
    if any(dim == 0 for dim in dims)
]


def given(
    name: str, dims: Sequence[Any], dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Callable[..., Any]]:
    names, function = CALLS[name]
    values = example(dtype)
    return [
        values[key] if dim == 0 else values[key][0] for key, dim in zip(names, dims, strict=True)
    ], function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "dims"), CASES)
def test_values(name: str, dims: Sequence[Any], dtype: torch.dtype) -> None:
    arguments, function = given(name, dims, dtype)
    actual = func.vmap(function, tuple(dims))(*arguments)
    torch.testing.assert_close(actual, loop(function, arguments, dims), equal_nan=True)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_gradients_of_each_element(name: str, dims: Sequence[Any]) -> None:
    arguments, function = given(name, dims)
    places = [place for place, value in enumerate(arguments) if value.is_floating_point()]

    def total(*arguments: Tensor) -> Tensor:
        results = function(*arguments)
        results = (results,) if torch.is_tensor(results) else results
        if len(results) > 1:  # the results with a gradient, and the mean loss
            statistics = marginops.SampleStatistics(
                *results[:8], None if len(results) == 9 else results[8], results[-1]
            )
            results = statistics.margin, statistics.loss, statistics.confidence, statistics.entropy
            finite = torch.where(statistics.counted, statistics.loss, 0)
            results = *results, finite.nan_to_num().sin()
        return sum(
            (value.nan_to_num(0, 0, 0) * (1 + torch.arange(len(value)))).sum() for value in results
        )

    gradient = func.grad(total, tuple(places))
    actual = func.vmap(gradient, tuple(dims))(*arguments)
    expected = loop(gradient, arguments, dims)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("order", ["vmap grad", "grad vmap", "leaf"])
def test_mean_loss_of_each_element(order: str) -> None:
    values = example()
    logits, target = values["logits"].nan_to_num(0, 0, 0), values["target"].clamp(min=0)
    target[0, 1] = IGNORED
    weight = 1 + torch.arange(BATCH, dtype=torch.float64)

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        return marginops.sample_statistics(logits, target).mean_loss()

    def total(logits: Tensor) -> Tensor:
        return (func.vmap(mean)(logits, target) * weight).sum()

    expected = torch.stack(
        [
            w * func.grad(torch.nn.functional.cross_entropy)(x, t)
            for w, x, t in zip(weight, logits, target, strict=True)
        ]
    )
    if order == "vmap grad":
        actual = func.vmap(func.grad(mean))(logits, target) * weight[:, None, None]
    elif order == "grad vmap":
        actual = func.grad(total)(logits)
    else:
        leaf = logits.clone().requires_grad_()
        total(leaf).backward()
        actual = leaf.grad
    torch.testing.assert_close(actual, expected)


def test_losses_and_their_mean_in_one_gradient() -> None:
    logits = example()["logits"].nan_to_num(0, 0, 0)
    target = example()["target"].clamp(min=0)
    weight = torch.arange(ROWS, dtype=torch.float64)

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        found = marginops.sample_statistics(logits, target)
        return 2 * found.mean_loss() + (found.loss * weight).sum()

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return 2 * losses.mean() + (losses * weight).sum()

    actual = func.vmap(func.grad(fused))(logits, target)
    torch.testing.assert_close(actual, func.vmap(func.grad(plain))(logits, target))


def test_gradient_of_norms_with_ignored_rows() -> None:
    values = example()
    logits, target = values["logits"].nan_to_num(0, 0, 0), values["target"]

    def total(log_norm: Tensor) -> Tensor:
        margins = func.vmap(
            lambda x, t, n: marginops.classification_margin(x, t, log_norm=n), (0, 0, 0)
        )(logits, target, log_norm)
        return torch.where(target == IGNORED, 0, margins).sum()

    log_norm = torch.linspace(-1, 1, BATCH, dtype=torch.float64)
    margins = torch.stack(
        [marginops.classification_margin(x, t) for x, t in zip(logits, target, strict=True)]
    )
    sums = torch.where(target == IGNORED, 0, margins).sum(1)
    torch.testing.assert_close(func.grad(total)(log_norm), -sums * (-log_norm).exp())


def test_batch_of_gradients_alone() -> None:
    """As in ``jacrev``: the logits are the same for all elements, and the gradients differ."""
    values = example()
    logits, target = values["logits"][0], values["target"][0]

    def statistics(logits: Tensor) -> Tensor:
        found = marginops.sample_statistics(logits, target)
        return torch.stack((found.loss, found.confidence, found.entropy))

    def plain(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        own = log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        found = torch.stack((-own, own.exp(), -(log_p.exp() * log_p).sum(1)))
        return torch.where(target == IGNORED, 0, found)

    torch.testing.assert_close(func.jacrev(statistics)(logits), func.jacrev(plain)(logits))


def kernel_calls(function: Callable[[], Any]) -> Counter[str]:
    """How often each kernel runs."""
    function()
    with torch.profiler.profile() as profile:
        function()
    events = (event.name for event in profile.events())
    return Counter(
        name.removeprefix("marginops_kernels::") for name in events if "marginops_kernels" in name
    )


LABELLED = {
    "classification_margin": marginops.classification_margin,
    "sample_statistics": lambda x, t: marginops.sample_statistics(x, t).loss,
    "mean loss": lambda x, t: marginops.sample_statistics(x, t).mean_loss(),
    "minimal_margin_score": lambda x, t: marginops.minimal_margin_score(x, torch.eye(CLASSES)),
    "linear_classification_margin": lambda x, t: marginops.linear_classification_margin(
        x, torch.eye(CLASSES), t
    ),
    "linear_sample_statistics": lambda x, t: (
        marginops.linear_sample_statistics(x, torch.eye(CLASSES), t).loss
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_one_call_computes_all_elements(name: str) -> None:
    def total(x: Tensor, t: Tensor) -> Tensor:
        return LABELLED[name](x, t).sum()

    logits, target = torch.randn(20, ROWS, CLASSES), torch.randint(0, CLASSES, (20, ROWS))
    function = LABELLED[name]
    forward = kernel_calls(lambda: function(logits[0], target[0]))
    backward = kernel_calls(lambda: func.grad(total)(logits[0], target[0]))
    op = "sample_statistics" if name == "mean loss" else name
    assert forward[op] == backward[op] == 1
    assert kernel_calls(lambda: func.vmap(function)(logits, target)) == forward
    nested = logits.unflatten(0, (4, 5)), target.unflatten(0, (4, 5))
    assert kernel_calls(lambda: func.vmap(func.vmap(function))(*nested)) == forward
    # The rule for the gradient of a linear head needs no call of its op.
    assert not kernel_calls(lambda: func.vmap(func.grad(total))(logits, target)) - backward
    total_of_all = func.grad(lambda x: func.vmap(total)(x, target).sum())
    assert kernel_calls(lambda: total_of_all(logits)) == backward


def test_gradient_of_each_sample_in_the_weight_is_one_call() -> None:
    """Also where the gradients are sums over the samples of a class."""
    features, target = torch.randn(9, 1, COLUMNS), torch.randint(0, CLASSES, (9, 1))
    weight = torch.randn(CLASSES, COLUMNS)
    calls: list[tuple[Callable[..., Tensor], str]] = [
        (
            lambda w, h, t: marginops.minimal_margin_score(h @ w.t().detach(), w).sum(),
            "pair_gradient",
        ),
        (lambda w, h, t: marginops.linear_classification_margin(h, w, t).sum(), "class_sum"),
        (
            lambda w, h, t: marginops.linear_sample_statistics(h, w, t).loss.sum(),
            "sample_statistics_gradient",
        ),
    ]
    for function, kernel in calls:
        gradient = func.vmap(func.grad(function), (None, 0, 0))
        counts = kernel_calls(lambda g=gradient: g(weight, features, target))
        assert counts[kernel] == 1, (kernel, counts)
        expected = [
            func.grad(function)(weight, h, t) for h, t in zip(features, target, strict=True)
        ]
        torch.testing.assert_close(gradient(weight, features, target), torch.stack(expected))


def test_same_chosen_rows_of_each_element() -> None:
    values = example()
    logits, target, rows = values["logits"], values["target"].clamp(min=0), torch.tensor([5, 0])

    def margin(logits: Tensor, target: Tensor) -> Any:
        return classification_margin_rival_op(logits, target, None, rows, IGNORED)

    def pair(logits: Tensor) -> Any:
        return minimal_margin_pair_op(logits, values["weight"][0], None, rows, False)

    for function, arguments in ((margin, (logits, target)), (pair, (logits,))):
        dims = (0,) * len(arguments)
        torch.testing.assert_close(
            func.vmap(function)(*arguments), loop(function, arguments, dims), equal_nan=True
        )


def test_empty_batch() -> None:
    logits = torch.empty(0, ROWS, CLASSES)
    target = torch.zeros(ROWS, dtype=torch.int64)
    margin = func.vmap(lambda x: marginops.classification_margin(x, target))(logits)
    assert margin.shape == (0, ROWS)
    statistics = func.vmap(lambda x: fields(marginops.sample_statistics(x, target)))(logits)
    assert {value.shape for value in statistics} == {(0, ROWS)}


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    logits = torch.randn(BATCH, rows, CLASSES, dtype=torch.float64)
    target = torch.ones(BATCH, rows, dtype=torch.int64)

    def total(logits: Tensor, target: Tensor) -> Tensor:
        found = marginops.sample_statistics(logits, target)
        return found.loss.sum() + marginops.classification_margin(logits, target).sum()

    actual = func.vmap(func.grad(total))(logits, target)
    torch.testing.assert_close(actual, loop(func.grad(total), (logits, target), (0, 0)))
    weight = torch.eye(CLASSES, dtype=torch.float64)

    def linear(weight: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        margin = marginops.linear_classification_margin(logits, weight, target)
        return margin.sum() + marginops.linear_sample_statistics(logits, weight, target).loss.sum()

    actual = func.vmap(func.grad(linear), (None, 0, 0))(weight, logits, target)
    expected = loop(func.grad(linear), (weight, logits, target), (None, 0, 0))
    torch.testing.assert_close(actual, expected)


def test_wrong_target_of_one_element_is_an_error() -> None:
    values = example()
    target = values["target"].clone()
    target[3, 2] = CLASSES
    with pytest.raises(RuntimeError, match=r"^.*target: expected classes in \[0, 4\)"):
        func.vmap(marginops.classification_margin)(values["logits"], target)
