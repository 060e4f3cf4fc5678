"""The linear head with its classes spread over processes equals the one in a single process."""

import dataclasses
import math
import re

import pytest
import torch

import marginops
from helpers.ranks import ranks_fixture
from helpers.rounding import assert_same
from helpers.sharded_calls import (
    DIFFERENTIABLE_FIELDS,
    EXACT,
    FUNCTIONS,
    assert_like_one_process,
    call_all,
    exact,
    example,
    results_of,
    with_gradient,
)
from marginops.ops import shard as shards

SIZES = [(1, 5, 3), (3, 0, 6), (0, 9, 0), (7, 1, 1)]

ranks = ranks_fixture(3)


def rounding_of(dtype):
    return 1e-12 if dtype == torch.float64 else 1e-5


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        *((torch.float64, sizes) for sizes in SIZES),
        (torch.float32, (1, 5, 3)),
        (torch.bfloat16, (3, 0, 6)),
    ],
    ids=str,
)
def test_values_of_exact_logits(ranks, dtype, sizes):
    """The logits are exact in any product and have many ties, also between ranks."""
    calls = []
    for function in FUNCTIONS:
        call = example(function, dtype, exact)
        calls += [call, call.replace(chunk_bytes=2 * 9 * dtype.itemsize)]
        calls.append(call.drop("bias", "bias_in_norm", "log_norm"))
    assert_like_one_process(ranks, calls, sizes, EXACT, rounding_of(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_random_logits(ranks, dtype):
    calls = [example(function, dtype) for function in FUNCTIONS]
    exact_names = {"rival", "correct", "indices"}
    assert_like_one_process(ranks, calls, (1, 5, 3), exact_names, rounding_of(dtype))


def test_log_probabilities(ranks):
    call = example(make=exact).drop("log_norm")
    call = dataclasses.replace(call, function="log_prob")
    calls = [with_gradient(call), with_gradient(call.replace(temperature=0.7))]
    assert_like_one_process(ranks, calls, (1, 5, 3), {"differentiable"}, 1e-12)


def test_tokens_of_several_sequences(ranks):
    calls = []
    for function in ("classification_margin", "minimal_margin_score", "sample_statistics"):
        call = with_gradient(example(function, make=exact))
        names = [name for name in ("input", "target") if name in call.arguments]
        shaped = call.replace(**{name: call.arguments[name].unflatten(0, (8, 5)) for name in names})
        grads = {name: value.view(8, 5) for name, value in call.grads.items()}
        calls.append(dataclasses.replace(shaped, grads=grads))
        assert "value" not in calls[-1]() or calls[-1]()["value"].shape == (8, 5)
    assert_like_one_process(ranks, calls, (1, 5, 3), EXACT, 1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_special_values(ranks, function):
    """Infinite logits, rows of only those, NaN, and a tie of -inf between ranks."""
    calls = []
    for bias in (
        [-math.inf] * 9,
        [-math.inf] * 4 + [1.0] + [-math.inf] * 4,
        [-math.inf] + [0.5] * 5 + [-math.inf] * 3,
        [0.0, math.inf, 1.0, 2.0, -math.inf, 3.0, 0.0, math.inf, 1.0],
        [0.0, 1.0, 2.0, math.nan, *[0.0] * 5],
        [-0.0] + [0.0] * 8,
    ):
        call = example(function, make=exact, bias=torch.tensor(bias, dtype=torch.float64))
        calls += [call, call.replace(weight=torch.zeros(9, 6, dtype=torch.float64))]
    call = example(function, make=exact)
    for row, value in ((3, math.nan), (8, math.nan), (15, math.inf)):
        call.arguments["input"][row, 2] = value
    calls.append(call)
    call = example(function, make=exact)
    call.arguments["input"][:, 0] = exact(40).sign() + 0.5
    call.arguments["weight"][[0, 6], 0] = torch.tensor([-math.inf, math.inf]).double()
    calls.append(call)
    calls = [with_gradient(call) for call in calls]
    assert_like_one_process(ranks, calls, (1, 8, 0), EXACT, 1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_edge_sizes(ranks, function):
    call = example(function, make=exact)
    call = call.replace(k=0) if "k" in call.arguments else call
    calls = [with_gradient(c) for c in (call, no_rows(call), call.replace(**no_columns(call)))]
    assert_like_one_process(ranks, calls, (1, 5, 3), EXACT, 1e-12)
    two = call.replace(**{name: call.arguments[name][:2] for name in ("weight", "bias")})
    if "target" in two.arguments:
        two = two.replace(target=two.arguments["target"].clamp(max=1))
    assert_like_one_process(ranks, [with_gradient(two)], (0, 1, 1), EXACT, 1e-12)


def no_rows(call):
    rows = {"input": call.arguments["input"][:0]}
    if "target" in call.arguments:
        rows["target"] = call.arguments["target"][:0]
    return call.replace(**rows)


def no_columns(call):
    return {name: call.arguments[name][:, :0] for name in ("input", "weight")}


@pytest.mark.parametrize(
    ("sizes", "chunk_bytes"), [((1, 5, 3), 400), ((3, 0, 6), None), ((0, 9, 0), None)], ids=str
)
def test_gradients(ranks, sizes, chunk_bytes):
    """Every rank has the gradient of the whole input, and of the weight and bias of its classes."""
    calls = []
    for function in FUNCTIONS:
        fields = [()]
        if function == "sample_statistics":
            fields = [(), *((name,) for name in DIFFERENTIABLE_FIELDS), ("margin", "entropy")]
        for names in fields:
            call = example(function, make=exact, chunk_bytes=chunk_bytes)
            calls += [with_gradient(call, *names)]
            calls.append(with_gradient(call.drop("bias", "bias_in_norm", "log_norm"), *names))
    assert_like_one_process(ranks, calls, sizes, EXACT, 1e-12)


def test_every_run_gives_the_same_bits(ranks):
    calls = [with_gradient(example(function, torch.float32)) for function in FUNCTIONS]
    runs = [results_of(ranks, calls, (1, 5, 3)) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        for name, value in one.items():
            assert_same(other[name], value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unchosen_samples_add_no_gradient(ranks, function):
    """This holds even if the gradient of an ignored or unchosen row is not finite."""
    call = example(function, make=exact)
    call.arguments["input"][7] = math.nan  # an ignored sample
    if "k" in call.arguments:
        call.arguments["input"][[3, 4]] = torch.tensor([[math.nan], [math.inf]]).double()
    assert_like_one_process(ranks, [with_gradient(call)], (1, 5, 3), EXACT, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_other_dtypes(ranks, dtype):
    calls = [with_gradient(example(function, dtype, exact)) for function in FUNCTIONS]
    # Each rank rounds its part before the parts are added.
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_like_one_process(ranks, calls, (1, 5, 3), EXACT, tolerance)


def test_autocast(ranks):
    calls = [
        dataclasses.replace(with_gradient(example(function, torch.float32, exact)), autocast=True)
        for function in FUNCTIONS
    ]
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    assert_like_one_process(ranks, calls, (1, 5, 3), EXACT, tolerance)


def test_frozen_arguments(ranks):
    """Only some arguments have a gradient."""
    for function in FUNCTIONS:
        for frozen in ({"input"}, {"weight", "bias"}, {"input", "bias", "log_norm"}):
            call = dataclasses.replace(with_gradient(example(function)), frozen=frozenset(frozen))
            assert_like_one_process(
                ranks, [call], (1, 5, 3), {"rival", "correct", "indices"}, 1e-11
            )


def gradient_with_graph(groups, call):
    input = call.arguments["input"].clone().requires_grad_()
    arguments = {**call.arguments, "input": input}
    margin = marginops.linear_classification_margin(**arguments, group=groups[0])
    torch.autograd.grad(margin.sum(), input, create_graph=True)


def test_second_derivatives_are_refused(ranks):
    for answer in ranks(gradient_with_graph, example("classification_margin").shards((1, 5, 3))):
        assert isinstance(answer, NotImplementedError)
        assert "second derivatives are not implemented" in str(answer)


def gradient_by_transform(groups, call):
    def total(input):
        arguments = {**call.arguments, "input": input}
        return marginops.linear_classification_margin(**arguments, group=groups[0]).sum()

    torch.func.grad(total)(call.arguments["input"])


def test_transforms_are_refused(ranks):
    for answer in ranks(gradient_by_transform, example("classification_margin").shards((1, 5, 3))):
        assert isinstance(answer, NotImplementedError)
        assert str(answer).startswith("group: expected None inside the transforms of torch.func")


class Drop(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def gradient_of_nothing(groups, call):
    input = call.arguments["input"].clone().requires_grad_()
    results = call.replace(input=input).arguments
    value = getattr(marginops, f"linear_{call.function}")(**results, group=groups[0])
    Drop.apply(value).sum().backward()
    return input.grad


@pytest.mark.parametrize("function", ["classification_margin", "minimal_margin_score"])
def test_a_gradient_that_does_not_arrive(ranks, function):
    assert ranks(gradient_of_nothing, example(function).shards((1, 5, 3))) == [None] * 3


def test_a_rank_without_classes_and_a_small_buffer(ranks):
    call = example("sample_statistics", make=exact)
    shards = [shard.replace(chunk_bytes=99) for shard in call.shards((4, 0, 5))]
    shards[1] = shards[1].replace(chunk_bytes=1)
    for answer in ranks.results(call_all, [[shard] for shard in shards]):
        torch.testing.assert_close(answer[0]["loss"], call()["loss"])


def call_with_small_exchanges(groups, call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_EXCHANGED_BYTES", 500)
        return call(groups[0])


def test_rows_of_the_weight_are_exchanged_in_parts(ranks):
    call = example("minimal_margin_score", make=exact)
    expected = call()["value"]
    for answer in ranks(call_with_small_exchanges, call.shards((1, 5, 3))):
        assert_same(answer["value"], expected)


def call_between_two(groups, call):
    """The call on the first and the last rank. Ranks in between are not in the group."""
    return call(groups[1])


def test_two_of_three_processes(ranks):
    """Ranks are numbered within the group, not by process."""
    call = with_gradient(example(make=exact))
    first, last = call.shards((4, 5))
    one, outsider, other = ranks(call_between_two, [first, first, last])
    assert isinstance(outsider, ValueError)
    assert re.search("group: .* member", str(outsider))
    expected = call()
    for name, value in expected.items():
        if name in ("grad_weight", "grad_bias"):
            torch.testing.assert_close(torch.cat((one[name], other[name])), value)
        else:
            assert_same(one[name], other[name])
            torch.testing.assert_close(one[name], value, equal_nan=True)
