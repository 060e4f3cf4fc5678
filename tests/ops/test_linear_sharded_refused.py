"""A linear head over processes: an error on one rank is an error on all of them."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers.ranks import ranks_fixture
from helpers.sharded_calls import (
    EXACT,
    FUNCTIONS,
    assert_like_one_process,
    call_all,
    exact,
    example,
    with_gradient,
)

ranks = ranks_fixture(3)


def wrong_arguments():
    """What one rank does differently, its error, and the message on every rank."""
    values = example(make=exact).arguments
    input, target = values["input"], values["target"]
    margin, score = "classification_margin", "minimal_margin_score"
    select = "select_minimal_margin"
    late = target.clone()
    late[5] = 9
    yield margin, {"input": input[:-1], "target": target[:-1]}, ValueError, "input"
    yield score, {"input": input[:-1]}, ValueError, "input"
    yield score, {"input": input[:, :-1], "weight": torch.ones(3, 5).double()}, ValueError, "input"
    single = {name: values[name].float() for name in ("input", "weight", "bias")}
    single = {**single, "weight": single["weight"][:3], "bias": single["bias"][:3]}
    yield score, single, ValueError, "input"
    yield score, {"weight": single["weight"]}, TypeError, "weight"
    yield score, {"weight": [[1.0]]}, TypeError, "weight"
    yield margin, {"bias": None}, ValueError, "bias"
    yield score, {"bias": None}, ValueError, "bias"
    yield score, {"bias_in_norm": False}, ValueError, "bias_in_norm"
    yield select, {"k": 14}, ValueError, "k: "
    yield select, {"k": 41}, ValueError, "k: "
    yield select, {"k": "2"}, TypeError, "k: "
    yield "select_classification_margin", {"k": 14}, ValueError, "k: "
    yield margin, {"ignore_index": -1}, ValueError, "ignore_index"
    yield margin, {"ignore_index": "none"}, TypeError, "ignore_index"
    yield margin, {"log_norm": None}, ValueError, "log_norm"
    yield margin, {"log_norm": "large"}, TypeError, "log_norm"
    yield margin, {"chunk_bytes": 23}, ValueError, "chunk_bytes: expected at least 24"
    yield margin, {"chunk_bytes": 1e6}, TypeError, "chunk_bytes"
    yield margin, {"target": target.int()}, TypeError, "target"
    yield margin, {"target": target[1:]}, ValueError, "target"
    yield margin, {"target": late}, RuntimeError, "target: .*0, 9.* got 9 on rank 1"
    yield margin, {"target": -3 - late}, RuntimeError, "target: .* got -12 on rank 1"
    yield score, {"rival": "nearest"}, ValueError, 'rival: expected "top2"'
    yield select, {"rival": "nearest"}, ValueError, 'rival: expected "top2"'
    yield select, {"rival": "farthest"}, ValueError, "rival"


@pytest.mark.parametrize(("function", "different", "error", "match"), list(wrong_arguments()))
def test_one_wrong_rank_is_an_error_on_all(ranks, function, different, error, match):
    calls = example(function, make=exact).shards((3, 3, 3))
    calls = [calls[0], calls[1].replace(**different), calls[2]]
    assert_all_raise(ranks, calls, error, match)


@pytest.mark.parametrize(
    ("different", "error", "match"),
    [
        ({"temperature": 0.5}, ValueError, "temperature: expected the same"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float"),
    ],
)
def test_one_wrong_temperature_is_an_error_on_all(ranks, different, error, match):
    call = dataclasses.replace(example(make=exact).drop("log_norm"), function="log_prob")
    one, two, three = call.shards((3, 3, 3))
    assert_all_raise(ranks, [one, two.replace(**different), three], error, match)


def test_ranks_that_do_different_things(ranks):
    """Without an error, each case would leave a rank waiting, now or in the backward pass."""
    calls = example("sample_statistics").shards((3, 3, 3))
    other = calls[1].replace()
    margin = dataclasses.replace(other, function="classification_margin")
    assert_all_raise(ranks, [calls[0], margin, calls[2]], ValueError, "function")
    assert_all_raise(ranks, [calls[0], with_gradient(other), calls[2]], ValueError, "requires_grad")
    calls = [with_gradient(call) for call in calls]
    frozen = dataclasses.replace(calls[1], frozen=frozenset({"input"}))
    assert_all_raise(ranks, [calls[0], frozen, calls[2]], ValueError, "requires_grad")
    names = ("input", "weight", "bias")
    single = [
        call.replace(**{name: call.arguments[name].float() for name in names}) for call in calls
    ]
    cast = dataclasses.replace(single[1], autocast=True)
    assert_all_raise(ranks, [single[0], cast, single[2]], ValueError, "autocast")


def assert_all_raise(ranks, calls, error, match):
    """Rank 1, whose call is wrong, raises ``error``; the others raise one that names it."""
    answers = ranks(call_all, [[call] for call in calls])
    for rank, answer in enumerate(answers):
        kinds = error if rank == 1 else (ValueError, RuntimeError)
        assert isinstance(answer, kinds), (rank, answer)
        assert re.search(match, str(answer)), (rank, answer)
    # No rank is left waiting in a collective.
    call = example("classification_margin", make=exact)
    assert_like_one_process(ranks, [call], (2, 3, 4), EXACT, 1e-12)


def test_too_few_classes(ranks):
    call = example("minimal_margin_score", make=exact)
    call = call.replace(weight=call.arguments["weight"][:1], bias=call.arguments["bias"][:1])
    for answer in ranks(call_all, [[shard] for shard in call.shards((0, 1, 0))]):
        assert isinstance(answer, ValueError)
        assert re.search(r"at least 2 classes .*\[0, 1, 0\]", str(answer))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_types_of_group(function):
    for group in ("world", 0, object()):
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup"):
            example(function)(group)


def test_without_torch_distributed():
    """PyTorch can be built without it. The stub has what is then left of the module."""
    code = """
        import sys, types
        import torch
        stub = types.ModuleType("torch.distributed")
        stub.is_available = lambda: False
        stub.ProcessGroup = type("Stub", (), {})
        sys.modules["torch.distributed"] = torch.distributed = stub
        import marginops
        input, weight = torch.ones(2, 3), torch.eye(3)
        print(marginops.linear_minimal_margin_score(input, weight).tolist())
        try:
            marginops.linear_minimal_margin_score(input, weight, group=object())
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MARGINOPS_DISABLE_JIT": "1"},
    )
    assert done.stdout.splitlines() == [
        "[0.0, 0.0]",
        "group: this build of PyTorch has no torch.distributed",
    ], done.stderr
