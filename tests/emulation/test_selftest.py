"""Kernels with one bug each: the emulation and the sanitizers see them."""

import pytest

from helpers.emulation.harness import TOOLS, run_selftest

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
def test_correct_kernels_pass(tool: str, order: str) -> None:
    result = run_selftest(tool, list(CORRECT), order)
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


@pytest.mark.parametrize(("name", "tool", "message"), BUGS, indirect=["tool"])
def test_bugs_are_seen(name: str, tool: str, message: str) -> None:
    result = run_selftest(tool, [name])
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize("name", ["two_masks", "outside_mask"])
def test_undefined_shuffles_give_nan(name: str) -> None:
    (written,) = _written(run_selftest("plain", [name]).stdout)
    assert any(value != value for value in written)
