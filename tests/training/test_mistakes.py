"""Mistakes of people who begin: every function names the argument and says what to do."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("torchmetrics")

import marginops
from helpers.mistakes import MISTAKES, C, D, N
from marginops import metrics
from marginops.ops import arguments
from marginops.training import (
    InversionMonitor,
    TrainingDynamics,
    report_epoch,
    score_batch,
    select_across_ranks,
    select_batch,
)


class Call(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]


def calls() -> dict[str, Call]:
    """A right call of every public function that takes logits, features, weights or targets."""
    generator = torch.Generator().manual_seed(1)
    logits, input = (torch.randn(N, width, generator=generator) for width in (C, D))
    weight, bias = torch.randn(C, D, generator=generator), torch.randn(C, generator=generator)
    layer, target = nn.Linear(D, C), torch.arange(N) % C
    labels = {"target": target, "ignore_index": -100}
    plain, k = {"logits": logits}, {"k": 3}
    norms = {"weight": weight, "bias": bias, "bias_in_norm": True}
    linear = {"input": input, "weight": weight, "bias": bias}
    margins = {"margins": logits[:, 0]}
    arguments = {
        "classification_margin": plain | labels,
        "minimal_margin_score": plain | norms,
        "sample_statistics": plain | labels | {"input": input},
        "select_classification_margin": plain | labels | k,
        "select_minimal_margin": plain | norms | k,
        "linear_classification_margin": linear | labels,
        "linear_log_prob": linear | labels,
        "linear_minimal_margin_score": linear,
        "linear_sample_statistics": linear | labels,
        "linear_select_classification_margin": linear | labels | k,
        "linear_select_minimal_margin": linear | k,
        "multi_margin_regularization": linear | labels | plain,
        "class_moments": {"input": input, "num_classes": C} | labels,
        "margin_area": margins,
        "support_vector_counts": margins,
        "select_smallest": {"scores": logits[:, 0]} | k,
    }
    found = {name: Call(getattr(marginops, name), given) for name, given in arguments.items()}
    collapse, manifolds = metrics.NeuralCollapse(C, D), metrics.ClassManifolds(C, D)
    second = metrics.NeuralCollapse(C, D, two_passes=True).update_nearest
    regularization = marginops.nn.MultiMarginRegularization(2)
    samples = {"input": input, "target": target}
    seen = {"indices": torch.arange(N), "input": input} | plain | labels
    epoch = {"radius": torch.rand(C), "misclassified": target > 0}
    others = (
        ("without logits", marginops.multi_margin_regularization, linear | labels),
        ("MultiMarginRegularization", regularization, linear | {"target": target} | plain),
        ("NeuralCollapse", collapse.update, samples | {"weight": weight}),
        ("NeuralCollapse second pass", second, samples | plain),
        ("ClassManifolds", manifolds.update, samples),
        ("MarginDistribution", metrics.MarginDistribution().update, margins),
        ("TrainingDynamics", TrainingDynamics(N).update, seen),
        ("InversionMonitor", InversionMonitor(C).update, epoch | {"target": target}),
        ("report_epoch", report_epoch, {"network": layer, "inputs": input, "target": target}),
        ("select_batch", select_batch, {"network": layer, "inputs": input} | k),
        ("score_batch", score_batch, {"network": layer, "inputs": input}),
        ("select_across_ranks", select_across_ranks, {"scores": logits[:, 0]} | k),
    )
    return found | {name: Call(function, given) for name, function, given in others}


CALLS = calls()
# They take logits of more dimensions: test_leading_dimensions.py has their wrong shapes.
ANY_DIMENSIONS = (
    "classification_margin",
    "minimal_margin_score",
    "sample_statistics",
    "TrainingDynamics",
)
# These pass, or the function has a better error of its own.
LEFT_OUT = {
    ("minimal_margin_score", "weight", "none"),
    ("select_minimal_margin", "weight", "none"),
    ("multi_margin_regularization", "logits", "none"),
    ("MultiMarginRegularization", "logits", "none"),
    ("sample_statistics", "input", "none"),
    ("TrainingDynamics", "input", "none"),
    ("NeuralCollapse", "weight", "none"),
    ("InversionMonitor", "target", "none"),
    ("NeuralCollapse second pass", "logits", "one column"),
    *((name, "logits", "sequence") for name in ANY_DIMENSIONS),
}
CASES = [
    pytest.param(function, argument, mistake, id=f"{function}-{argument}-{mistake}")
    for function, call in CALLS.items()
    for argument, mistakes in MISTAKES.items()
    if argument in call.arguments
    for mistake in mistakes
    if (function, argument, mistake) not in LEFT_OUT
]


@pytest.mark.parametrize("function", CALLS)
def test_right_arguments_are_taken(function: str) -> None:
    CALLS[function].function(**CALLS[function].arguments)


def test_the_table_has_every_function() -> None:
    functions = {name for name in marginops.__all__ if name[0].islower()} - {"nn"}
    assert functions - set(CALLS) == {"log_norm_product", "log_spectral_complexity"}


def error_of(function: str, argument: str, mistake: str) -> Exception:
    call = CALLS[function]
    wrong = MISTAKES[argument][mistake].change(call.arguments[argument])
    with pytest.raises((TypeError, ValueError)) as raised:
        call.function(**{**call.arguments, argument: wrong})
    return raised.value


@pytest.mark.parametrize(("function", "argument", "mistake"), CASES)
def test_a_mistake_is_named_with_what_to_do(function: str, argument: str, mistake: str) -> None:
    _, kind, message = MISTAKES[argument][mistake]
    error = error_of(function, argument, mistake)
    # Of two tensors on different devices, either may be the wrong one.
    name = r"\w+" if mistake == "device" else argument
    assert isinstance(error, kind), error
    assert re.match(f"{name}: {message}", str(error)), error


def test_features_of_another_width_are_named() -> None:
    call = CALLS["linear_minimal_margin_score"]
    narrow = call.arguments | {"input": call.arguments["input"][:, :5]}
    with pytest.raises(
        ValueError, match=r"weight: expected 5 .* got .*4, 6\]; pass the features that"
    ):
        call.function(**narrow)


def test_a_log_norm_of_numpy_is_named() -> None:
    call = CALLS["classification_margin"]
    with pytest.raises(TypeError, match=r"log_norm: .* got float32; pass float\(log_norm\)"):
        call.function(**call.arguments, log_norm=np.float32(1))


@pytest.mark.parametrize(
    ("function", "argument", "mistake"),
    [
        ("classification_margin", "target", "int32"),
        ("classification_margin", "logits", "binary"),
        ("minimal_margin_score", "weight", "transposed"),
        ("minimal_margin_score", "weight", "layer"),
        ("select_minimal_margin", "k", "share"),
        ("linear_sample_statistics", "target", "one-hot"),
    ],
)
def test_compiled_code_gives_the_same_errors(function: str, argument: str, mistake: str) -> None:
    call = CALLS[function]
    expected = error_of(function, argument, mistake)
    wrong = MISTAKES[argument][mistake].change(call.arguments[argument])
    given = {**call.arguments, argument: wrong}
    with pytest.raises(type(expected)) as raised:
        torch.compile(lambda: call.function(**given), backend="eager")()
    assert str(raised.value) == str(expected)
    # Without graph breaks the error is one of the compiler, which quotes this text. Sizes may be
    # symbols.
    todo = re.escape(str(expected).partition("; ")[2][:40])
    with pytest.raises(Exception, match=f"{argument}: expected .*; {todo}"):
        torch.compile(lambda: call.function(**given), backend="eager", fullgraph=True)()


LOGITS = torch.randn(N, C, generator=torch.Generator().manual_seed(2))
USES = {
    "sample_statistics": lambda values: marginops.sample_statistics(values, torch.arange(N) % C),
    "minimal_margin_score": lambda values: marginops.minimal_margin_score(
        values, torch.eye(C, dtype=values.dtype, device=values.device)
    ),
    "select_minimal_margin": lambda values: marginops.select_minimal_margin(
        values, torch.eye(C, dtype=values.dtype), k=3
    ),
}


@pytest.fixture
def first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a process that has not called anything."""
    monkeypatch.setattr(arguments, "_looks", 16)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_probabilities_give_one_warning(
    use: Callable[[Tensor], Any], dtype: torch.dtype, first_calls: None
) -> None:
    probabilities = LOGITS.softmax(1).to(dtype)
    with pytest.warns(
        UserWarning, match=r"^logits: .* look like probabilities; .*log\(p\)"
    ) as seen:
        use(probabilities)
    assert [warning.filename for warning in seen] == [__file__], "the place of the call"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(probabilities)


def quiet_cases() -> dict[str, Tensor]:
    pairs = torch.stack((LOGITS[:, 0], 1 - LOGITS[:, 0]), 1)
    return {
        "logits": LOGITS,
        "log-probabilities": LOGITS.log_softmax(1),
        "no rows": LOGITS[:0].softmax(1),
        "one-hot": torch.eye(C)[torch.arange(N) % C],
        "ties": torch.full((N, C), 1 / C),
        "sums of 1 with negative values": torch.cat((pairs, torch.zeros(N, C - 2)), 1),
        "one row of logits": torch.cat((LOGITS.softmax(1)[:5], LOGITS[5:])),
        "NaN": LOGITS.softmax(1) * torch.nan,
    }


@pytest.mark.parametrize("case", quiet_cases())
def test_logits_give_no_warning(case: str, first_calls: None) -> None:
    values = quiet_cases()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marginops.sample_statistics(values, torch.arange(len(values)) % C)


def test_margins_of_probabilities_give_no_warning(first_calls: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marginops.classification_margin(LOGITS.softmax(1), torch.arange(N) % C)


def test_only_the_first_calls_look(first_calls: None) -> None:
    use = USES["minimal_margin_score"]
    for _ in range(16):
        use(LOGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(LOGITS.softmax(1))


def test_looks_of_eager_calls_compile_nothing_again(first_calls: None) -> None:
    torch.compiler.reset()
    use, counter = USES["minimal_margin_score"], CompileCounterWithBackend("eager")
    compiled = torch.compile(use, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(LOGITS)
        use(LOGITS)
    assert counter.frame_count == 1


def test_nothing_is_read_where_there_are_no_values(first_calls: None) -> None:
    use, probabilities = USES["minimal_margin_score"], LOGITS.softmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with FakeTensorMode():
            use(torch.empty(N, C))
        torch.compile(use, backend="eager", fullgraph=True)(probabilities)
        torch.fx.experimental.proxy_tensor.make_fx(use)(probabilities)
        torch.export.export(Scored(), (probabilities,), strict=False)
        use(torch.empty(N, C, device="meta"))
    assert arguments._looks == 16


class Scored(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return marginops.minimal_margin_score(values, torch.eye(C))
