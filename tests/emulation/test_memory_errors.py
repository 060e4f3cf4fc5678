"""The ops on the emulated CUDA kernels, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from helpers.emulation import harness
from helpers.emulation.op_tests import FAILING_LAUNCHES, assert_tests_pass, op_tests

OVERRUN = """
import ctypes, os, sys, torch, marginops
torch.ops.load_library(os.environ["MARGINOPS_TEST_LIBRARY"])
rows = int(sys.argv[1])
tensor = torch.zeros(20, 70)
memory = (ctypes.c_float * (70 * rows)).from_address(tensor.data_ptr())
logits = torch.frombuffer(memory, dtype=torch.float32).view(rows, 70)
marginops.minimal_margin_score(logits, torch.zeros(70, 3))
"""


def test_access_beyond_a_tensor_is_seen() -> None:
    inside = harness.run_library("asan", ["-c", OVERRUN, "20"])
    beyond = harness.run_library("asan", ["-c", OVERRUN, "21"])
    assert inside.returncode == 0, inside.stderr[-8000:]
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr


def test_ops() -> None:
    files = op_tests("linear", "distribution")
    # These call the same kernels once more, and take longest.
    slow = ["compile", "opcheck", "70001", "ties_across", "gradient_of_chosen"]
    assert_tests_pass("asan", [FAILING_LAUNCHES, *files], slow)


def test_every_op() -> None:
    result = harness.run_library("asan", ["-m", "helpers.emulation.every_op"])
    assert result.returncode == 0, result.stderr[-8000:]
