"""The CUDA kernels, run on the CPU (see cudacpu/README.md) and compared with brute force."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cudacpu import expected, harness, margin_cases, score_cases, select_cases
from cudacpu.harness import TOOLS, Case, LaunchError, execute, run_cases
from cudacpu.tensors import DTYPES, LAYOUTS, VALUES, Checked, filled, laid_out

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


CORRECT = {
    "barrier": list(range(63, -1, -1)),
    "syncwarp": list(range(31, -1, -1)),
    "fence": [63 * 64 // 2],
    "copy": [2] * 64,
    "shared": [1] * 64,
    "aligned": [2] * 8,
    "collectives": [1] * 82,
}


def _written(stdout: str) -> list[float]:
    return [float(word) for word in stdout.splitlines()[1].split()[1:]]


@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2"])
@pytest.mark.parametrize("name", [*CORRECT, "atomics"])
@pytest.mark.parametrize("tool", TOOLS)
def test_correct_kernels_pass(program: Program, tool: str, name: str, order: str) -> None:
    result = execute(program("selftest", tool), [name], order)
    assert result.returncode == 0, result.stderr
    if name == "atomics":
        assert result.stdout.splitlines()[2] == "counters: 896 0 69 255 1344"
    else:
        assert _written(result.stdout)[: len(CORRECT[name])] == CORRECT[name]


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


@pytest.mark.parametrize("order", ["forward", "reverse", "1"])
@pytest.mark.parametrize(("name", "tool", "message"), BUGS)
def test_bugs_are_seen(
    program: Program, name: str, tool: str, message: str, order: str
) -> None:
    result = execute(program("selftest", tool), [name], order)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["two_masks", "outside_mask"])
def test_undefined_shuffles_give_nan(program: Program, name: str) -> None:
    written = _written(execute(program("selftest", "plain"), [name]).stdout)
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
    "pair_gradient": lambda small, _: score_cases.pair_gradient(small),
    "select_sorted": _select_sorted,
    "select_unsorted": lambda small, _: select_cases.select_unsorted(small),
}


def _check(driver: Path, checked: list[Checked], order: str = "forward") -> None:
    every = run_cases(driver, [one.case for one in checked], order)
    for one, outputs in zip(checked, every, strict=True):
        try:
            one.check(outputs)
        except AssertionError as error:
            raise AssertionError(f"{one.case.op} {one.label}: {error}") from error


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("tool", TOOLS)
def test_equals_brute_force(program: Program, tool: str, op: str) -> None:
    driver = program("driver", tool)
    _check(driver, list(CASES[op](tool == "tsan", driver)))


@pytest.mark.parametrize("op", CASES)
def test_order_of_threads_does_not_matter(program: Program, op: str) -> None:
    driver = program("driver", "plain")
    cases = [one.case for one in CASES[op](False, driver)]
    forward = run_cases(driver, cases)
    for order in ("reverse", "1", "2"):
        for case, one, other in zip(cases, forward, run_cases(driver, cases, order), strict=True):
            for name in case.outputs:
                same = one[name].numpy().tobytes() == other[name].numpy().tobytes()
                assert same, f"{case} {name} differs in order {order}"
