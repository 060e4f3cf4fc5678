"""The ops without native kernels: the dispatcher runs the reference, with gradients."""

import os
import re
import subprocess
import sys

from helpers.ops import OP_TESTS


def test_gradients_and_registration_without_native_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not wrong and (gradient or opcheck or autocast or compile or derivative)"]
    command.append(str(OP_TESTS))
    environment = os.environ | {"MARGINOPS_DISABLE_JIT": "1"}
    environment.pop("MARGINOPS_TEST_LIBRARY", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 30
