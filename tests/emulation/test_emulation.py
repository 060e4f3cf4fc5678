"""The CUDA kernels, run on the CPU (see cudacpu/README.md) and compared with brute force."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.emulation import (
    expected,
    gradient_cases,
    harness,
    margin_cases,
    moments_cases,
    score_cases,
    select_cases,
    statistics_cases,
)
from helpers.emulation.harness import TOOLS, Case, LaunchError, execute, run_cases
from helpers.emulation.tensors import (
    DTYPES,
    LAYOUTS,
    VALUES,
    Checked,
    assert_same,
    filled,
    laid_out,
)
from helpers.ops import OP_TESTS

pytestmark = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))

Program = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def program() -> Program:
    """``program(name, tool)``: a built program; skips where the tool does not start."""
    wanted = [(name, tool) for name in ("driver", "selftest") for tool in TOOLS]
    with ThreadPoolExecutor(2) as pool:
        futures = {key: pool.submit(harness.build, *key) for key in wanted}

    @cache
    def complaint(tool: str) -> str | None:
        result = execute(futures["selftest", tool].result(), ["barrier"])
        return result.stderr[-300:] if result.returncode else None

    def get(name: str, tool: str) -> Path:
        path = futures[name, tool].result()
        if tool == "tsan" and complaint(tool):
            pytest.skip(f"ThreadSanitizer does not start here: {complaint(tool)}")
        return path

    return get


CORRECT = {  # what each kernel writes first, and the atomics last
    "barrier": list(range(63, -1, -1)),
    "syncwarp": list(range(31, -1, -1)),
    "fence": [63 * 64 // 2],
    "copy": [2] * 64,
    "shared": [1] * 64,
    "aligned": [2] * 8,
    "collectives": [1] * 82,
    "atomics": [-1] * 128 + [896, 0, 69, 255, 1344],
}


def _written(stdout: str) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in stdout.splitlines()]


@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2"])
@pytest.mark.parametrize("tool", TOOLS)
def test_correct_kernels_pass(program: Program, tool: str, order: str) -> None:
    result = execute(program("selftest", tool), list(CORRECT), order)
    assert result.returncode == 0, result.stderr
    written = _written(result.stdout)
    for line, (name, values) in zip(written, CORRECT.items(), strict=True):
        assert line[: len(values)] == values, name


# Each bug, the tool that must see it, and what it must say.
BUGS = [
    ("no_barrier", "tsan", "data race"),
    ("no_syncwarp", "tsan", "data race"),
    ("no_fence", "tsan", "data race"),
    ("blocks_race", "tsan", "data race"),
    ("global_overrun", "asan", "heap-buffer-overflow"),
    ("shared_overrun", "asan", "index 64 out of bounds for type 'float [64]'"),
    ("misaligned", "asan", "misaligned address"),
    ("stack_overflow", "asan", "stack-overflow"),
    *(
        (name, tool, message)
        for tool in TOOLS
        for name, message in {
            "divergent_shuffle": "of warp 0 lanes 0x0000ffff wait in __shfl_xor_sync(0xffffffff)",
            "divergent_barrier": "deadlock: 16 of 32 live threads wait in a block barrier",
            "not_in_mask": "__shfl_sync(0x0000ffff): the calling lane is not in the mask",
            "assertion": "assertion failed: threadIdx.x < 5",
            "too_many_threads": "invalid launch configuration",
        }.items()
    ),
]


@pytest.mark.parametrize(("name", "tool", "message"), BUGS)
def test_bugs_are_seen(program: Program, name: str, tool: str, message: str) -> None:
    result = execute(program("selftest", tool), [name])
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize("name", ["two_masks", "outside_mask"])
def test_undefined_shuffles_give_nan(program: Program, name: str) -> None:
    (written,) = _written(execute(program("selftest", "plain"), [name]).stdout)
    assert any(value != value for value in written)


def _select_sorted(small: bool, driver: Path) -> Iterator[Checked]:
    pairs = [(len(scores), k) for scores, k, _ in select_cases.selection_scores(small)]
    fits = dict(zip(pairs, _fits(driver, pairs), strict=True))
    return select_cases.select_sorted(lambda n, k: fits[n, k], small)


def _fits(driver: Path, pairs: list[tuple[int, int]]) -> list[bool]:
    output = {"fits": (torch.int64, (1,))}
    cases = [Case("fits_one_block", {"n": n, "k": k}, {}, output) for n, k in pairs]
    return [bool(outputs["fits"]) for outputs in run_cases(driver, cases)]


CASES: dict[str, Callable[[bool, Path], Iterator[Checked]]] = {
    "classification_margin": lambda small, _: margin_cases.classification_margin(small),
    "classification_margin_rival": lambda small, _: margin_cases.classification_margin_rival(small),
    "minimal_margin_score": lambda small, _: score_cases.minimal_margin_score(small),
    "minimal_margin_pair": lambda small, _: score_cases.minimal_margin_pair(small),
    "pair_gradient": lambda small, _: gradient_cases.pair_gradient(small),
    "pair_distance": lambda small, _: gradient_cases.pair_distance(small),
    "class_sum": lambda small, _: gradient_cases.class_sum(small),
    "class_moments": lambda small, _: moments_cases.class_moments(small),
    "sample_statistics": lambda small, _: statistics_cases.sample_statistics(small),
    "sample_statistics_gradient": (
        lambda small, _: statistics_cases.sample_statistics_gradient(small)
    ),
    "row_sums": lambda small, _: statistics_cases.row_sums(small),
    "select_sorted": _select_sorted,
    "select_unsorted": lambda small, _: select_cases.select_unsorted(small),
}


def _check(
    driver: Path, checked: list[Checked], order: str = "forward", multiprocessors: int = 132
) -> None:
    every = run_cases(driver, [one.case for one in checked], order, multiprocessors)
    for one, outputs in zip(checked, every, strict=True):
        try:
            one.check(outputs)
        except AssertionError as error:
            raise AssertionError(f"{one.case.op} {one.label}: {error}") from error


# The others' launches do not depend on the device.
SHARED_OUT = set(CASES) - {
    "select_sorted",
    "pair_gradient",
    "pair_distance",
    "class_sum",
    "class_moments",
}
WAYS = [(n, op) for n in (132, 2) for op in CASES if n == 132 or op in SHARED_OUT]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where inf - inf is NaN
@pytest.mark.parametrize(("multiprocessors", "op"), WAYS)
@pytest.mark.parametrize("tool", TOOLS)
def test_equals_brute_force(program: Program, tool: str, multiprocessors: int, op: str) -> None:
    driver = program("driver", tool)
    _check(driver, list(CASES[op](tool == "tsan", driver)), multiprocessors=multiprocessors)


@pytest.mark.parametrize(("multiprocessors", "op"), WAYS)
def test_order_of_threads_does_not_matter(program: Program, multiprocessors: int, op: str) -> None:
    driver = program("driver", "plain")
    cases = [one.case for one in CASES[op](True, driver)]
    forward = run_cases(driver, cases, "forward", multiprocessors)
    for order in ("reverse", "1", "2"):
        again = run_cases(driver, cases, order, multiprocessors)
        for case, one, other in zip(cases, forward, again, strict=True):
            for name in case.outputs:
                same = torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
                assert same, f"{case.op} {case.numbers}: {name} differs in order {order}"


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_bad_target_fails_the_launch_by_name(program: Program, wrong: int) -> None:
    logits = filled((3, 7), torch.float32, "normal", 0)
    target = torch.tensor([0, wrong, 3])
    case = margin_cases.margin_case(logits, target, None, False, "").case
    with pytest.raises(LaunchError, match=r"case 0: classification_margin[\s\S]*assertion failed"):
        run_cases(program("driver", "asan"), [case])


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_bad_target_fails_the_statistics(program: Program, wrong: int) -> None:
    logits, right = filled((3, 7), torch.float32, "normal", 0), torch.tensor([0, 6, 3])
    case = statistics_cases.statistics_case(logits, right, None, None, "").case
    inputs = {**case.inputs, "target": torch.tensor([0, wrong, 3])}
    with pytest.raises(LaunchError, match=r"case 0: sample_statistics\n[\s\S]*assertion failed"):
        run_cases(program("driver", "asan"), [replace(case, inputs=inputs)])


@pytest.mark.parametrize("wrong", [-1, 3, 256, 2**40])
def test_bad_target_fails_the_moments(program: Program, wrong: int) -> None:
    target = torch.tensor([0, wrong, 2])
    case = moments_cases.moments_case(torch.ones(3, 2), target, 3, False, "").case
    with pytest.raises(LaunchError, match=r"case 0: class_moments[\s\S]*assertion failed"):
        run_cases(program("driver", "asan"), [case])


def test_moments_of_many_rows(program: Program) -> None:
    _check(program("driver", "plain"), [moments_cases.many_rows()])


@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
def test_bad_keys_and_pairs_fail_the_launch(program: Program, wrong: int) -> None:
    rows, last = torch.ones(5, 3), torch.tensor([0, 7, wrong])
    cases = [
        gradient_cases.sum_case(last.sort().values, torch.ones(3), rows, 4, "").case,
        gradient_cases.distance_case(
            rows, None, torch.stack((last, last[:1].expand(3)), 1), ""
        ).case,
    ]
    for case in cases:
        with pytest.raises(LaunchError, match=rf"case 0: {case.op}[\s\S]*assertion failed"):
            run_cases(program("driver", "asan"), [case])


@pytest.mark.parametrize("rows", [50, 16400])  # distances one by one, and from a table
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_distance_has_the_bits_of_the_pair(
    program: Program, dtype: torch.dtype, rows: int
) -> None:
    logits = filled((rows, 12), dtype, "normal", 3)
    weight = laid_out(filled((12, 70), dtype, "normal", 4), "padded")
    bias = filled((12,), dtype, "normal", 5)
    driver = program("driver", "plain")
    case = score_cases.pair_case(logits, weight, bias, None, True, "").case
    (of_rows,) = run_cases(driver, [case])
    case = gradient_cases.distance_case(weight, bias, of_rows["pair"], "").case
    (of_pairs,) = run_cases(driver, [case])
    assert torch.equal(of_rows["distance"], of_pairs["distance"])


def test_statistics_have_the_bits_of_the_margin(program: Program) -> None:
    driver = program("driver", "plain")
    for logits, label, seed in statistics_cases.statistics_logits(True):
        target = margin_cases.target_for(logits, seed, "contiguous")
        checked = [
            margin_cases.margin_case(logits, target, 3.5, False, ""),
            margin_cases.rival_case(logits, target, None, 3.5, ""),
            statistics_cases.statistics_case(logits, target, None, 3.5, ""),
        ]
        margin, rival, every = run_cases(driver, [one.case for one in checked])
        for outputs in (rival, every):
            assert_same(outputs["margin"], margin["margin"])
        assert torch.equal(rival["rival"], every["rival"]), label


def test_no_rows(program: Program) -> None:
    logits = torch.empty(0, 5)
    none = torch.empty(0, dtype=torch.int64)
    weight, two, labels = torch.ones(5, 3), torch.ones(2, 5), torch.tensor([1, 2])
    checked = [
        margin_cases.margin_case(logits, none, None, False, ""),
        margin_cases.rival_case(two, labels, none, None, ""),
        score_cases.score_case(logits, weight, None, True, ""),
        score_cases.pair_case(two, weight, None, none, False, ""),
        gradient_cases.distance_case(weight, None, none.reshape(0, 2), ""),
        gradient_cases.sum_case(none, torch.empty(0), weight, 4, ""),
        gradient_cases.sum_case(none, torch.empty(0), weight[:0], 4, ""),
        gradient_cases.sum_case(none, torch.empty(0), weight, 0, ""),
        gradient_cases.sum_case(torch.tensor([3]), torch.ones(1), weight[:, :0], 1, ""),
        statistics_cases.statistics_case(logits, none, None, None, ""),
        statistics_cases.gradient_case(logits, none, ("grad_loss",), None, 1, ""),
        statistics_cases.shard_case(logits, none, ""),
        moments_cases.moments_case(logits, none, 3, False, ""),
        moments_cases.moments_case(logits, none, 3, True, ""),
        moments_cases.moments_case(logits[:, :0], none, 300, False, ""),
    ]
    _check(program("driver", "asan"), checked)


def test_fits_one_block(program: Program) -> None:
    pairs = [(1, 1), (1000, 64), (10**8, 5), (10**5, 10**5)]
    assert _fits(program("driver", "plain"), pairs) == [True, True, False, False]


def _any_statistics(
    draw: st.DrawFn, logits: Tensor, target: Tensor, seed: int, label: str
) -> Checked:
    if draw(st.booleans()):
        return statistics_cases.shard_case(logits[:, draw(st.integers(0, 1)) :], target, label)
    if draw(st.booleans()):
        return statistics_cases.statistics_case(logits, target, None, None, label)
    given = tuple(sorted(draw(st.sets(st.sampled_from(("grad_margin", *statistics_cases.DENSE))))))
    return statistics_cases.gradient_case(logits, target, given, None, seed, f"{label} {given}")


@st.composite
def _any_case(draw: st.DrawFn) -> Checked:
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    kind, layout = draw(st.sampled_from(VALUES)), draw(st.sampled_from(LAYOUTS))
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(2, 70))
    if draw(st.integers(0, 4)) == 0:
        target = moments_cases.target_for(rows * 12, classes, seed)
        values = laid_out(
            filled((rows * 12, draw(st.integers(0, 40))), dtype, "normal", seed), layout
        )
        return moments_cases.moments_case(values, target, classes, draw(st.booleans()), "")
    if draw(st.booleans()):
        k = draw(st.integers(0, rows * classes))
        scores = laid_out(filled((rows * classes,), dtype, kind, seed), layout)
        one = draw(st.sampled_from((select_cases.sorted_case, select_cases.unsorted_case)))
        return one(scores, k, f"{dtype} {kind} {layout}")
    logits = laid_out(filled((rows, classes), dtype, kind, seed), layout)
    label = f"{dtype} [{rows}, {classes}] {kind} {layout} {seed}"
    if draw(st.booleans()):
        target = margin_cases.target_for(logits, seed, layout)
        if draw(st.booleans()):
            some = margin_cases.rows_for(logits, seed, layout)
            return margin_cases.rival_case(logits, target, some, None, label)
        if draw(st.booleans()):
            return _any_statistics(draw, logits, target, seed, label)
        norm = draw(st.none() | st.floats(-3000, 3000))
        on_device = norm is not None and draw(st.booleans())
        return margin_cases.margin_case(logits, target, norm, on_device, f"{label} {norm}")
    wide = expected.result_dtype(dtype)
    weight_kind = draw(st.sampled_from(score_cases.WEIGHTS))
    weight_dtype = draw(st.sampled_from((dtype, wide)))
    features = draw(st.integers(1, 40))
    weight = score_cases.weight_of(classes, features, weight_dtype, weight_kind, seed)
    weight = laid_out(weight, draw(st.sampled_from(LAYOUTS)))
    bias = filled((classes,), weight_dtype, "normal", seed) if draw(st.booleans()) else None
    nearest = draw(st.booleans())
    label = f"{label}; weight {weight_dtype} {weight_kind} bias={bias is not None} {nearest}"
    return score_cases.pair_case(logits, weight, bias, None, nearest, label)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(checked=st.lists(_any_case(), min_size=1, max_size=12), order=st.sampled_from(("7", "8")))
def test_random_cases(program: Program, checked: list[Checked], order: str) -> None:
    _check(program("driver", "asan"), checked, order)


# What starts processes of its own, which know nothing of the binding, or needs a GPU.
NOT_BOUND = {OP_TESTS / f"test_{name}.py" for name in ("linear_sharded", "memory", "cuda")}


def test_ops_through_the_binding() -> None:
    """The tests of the ops themselves, on the CUDA library's binding and the emulated kernels.

    Left out: references, which have no kernels; wrong targets and keys, which are assertions of
    the device; and what only takes long here, as several processes do.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += sorted(str(path) for path in {*OP_TESTS.glob("test_*.py")} - NOT_BOUND)
    left_out = ("reference", "wrong_target", "wrong_keys", "32_bit", "300000")
    left_out += ("(wrong_direct_calls_of_the_gradient and 12)",)
    # The order in which CUDA sums the squares of columns depends on how rows are aligned.
    left_out += ("do_not_depend_on_threads_layouts",)
    command += ["-k", " and ".join(f"not {name}" for name in left_out)]
    environment = os.environ | {"MARGINOPS_TEST_LIBRARY": str(harness.build_binding())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200
