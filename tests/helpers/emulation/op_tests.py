"""Starts the tests of the ops on the emulated CUDA kernels."""

from collections.abc import Sequence
from pathlib import Path

from helpers.emulation import harness
from helpers.ops import OP_TESTS

FAILING_LAUNCHES = harness.HERE / "failing_launches.py"
# Processes of their own, which know nothing of the emulated kernels, or a GPU.
NOT_EMULATED = ("linear_sharded", "distributed_head", "memory", "cuda")
LEFT_OUT = (
    "reference",  # has no kernels
    # Here, wrong values are assertions of the device: see failing_launches.py.
    "wrong_target",
    "wrong_keys",
    "index_out_of_range",
    "no_samples_take_no_row",
    "(wrong_arguments and RuntimeError)",
    "(wrong_direct_calls_of_the_gradient and 12)",
    # The order in which CUDA sums the squares of columns depends on how rows are aligned.
    "do_not_depend_on_threads_layouts",
    # These take long.
    "32_bit",
    "300000",
)


def op_tests(*without: str) -> list[Path]:
    """The files of ``tests/ops`` that can run here and have none of these parts in their names."""
    left_out = (*NOT_EMULATED, *without)
    files = sorted(OP_TESTS.glob("test_*.py"))
    return [path for path in files if not any(part in path.stem for part in left_out)]


def assert_tests_pass(
    tool: str, files: Sequence[Path], left_out: Sequence[str] = (), multiprocessors: int = 132
) -> None:
    """Run tests with kernels built for a tool; ``left_out`` are parts of tests' names."""
    names = " and ".join(f"not {name}" for name in (*LEFT_OUT, *left_out))
    # Sanitizers write to standard error: pytest must not capture it.
    command = ["-m", "pytest", "-x", "-v", "--capture=sys", "-p", "no:cacheprovider", "-k", names]
    result = harness.run_library(
        tool, [*command, *map(str, files)], multiprocessors=multiprocessors
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-8000:]}"
