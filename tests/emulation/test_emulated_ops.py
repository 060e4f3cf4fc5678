"""The tests of the ops, on the emulated CUDA kernels; and the order of threads."""

from helpers.emulation import harness
from helpers.emulation.op_tests import FAILING_LAUNCHES, assert_tests_pass, op_tests


def test_ops_on_few_multiprocessors() -> None:
    # The ops of a linear layer run the same kernels on its logits; distribution has none.
    files = op_tests("linear_arguments", "linear_gradient", "distribution")
    assert_tests_pass("plain", [FAILING_LAUNCHES, *files], multiprocessors=2)


def test_order_of_threads_does_not_matter() -> None:
    command = ["-m", "helpers.emulation.every_op", "--orders", "forward", "reverse", "1", "2"]
    result = harness.run_library("plain", command)
    assert result.returncode == 0, result.stderr[-2000:]
