"""Every op on the emulated CUDA kernels, under ThreadSanitizer."""

from helpers.emulation import harness


def test_every_op(tsan: str) -> None:
    command = ["-m", "helpers.emulation.every_op", "--few"]
    result = harness.run_library(tsan, command)
    assert result.returncode == 0, result.stderr[-8000:]
