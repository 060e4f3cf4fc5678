"""Errors of native code: one sentence for the user, without a path, also where memory is short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import marginops
from helpers.processes import INSTALLED
from marginops import _native
from marginops._native.plan import csrc_folder

KERNELS = torch.ops.marginops_kernels
LOGITS, TARGET = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
# Runs CALL with so much memory left in the address space. One thread, because a thread that cannot
# be started ends the process.
SHORT_OF_MEMORY = """
import resource, sys, torch, marginops
torch.set_num_threads(1)
marginops.select_smallest(torch.ones(4), 2)
marginops.class_moments(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), 3)
scores, empty = torch.ones(20_000_000), torch.ones(4, 0)
classes = torch.zeros(4, dtype=torch.int64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 1_000_000, -1))
try:
    CALL
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def _native_kernels() -> None:
    if not _native.load("cpu"):
        pytest.skip("there are no native kernels for the CPU")


def score(*head: torch.Tensor | None) -> torch.Tensor:
    return KERNELS.minimal_margin_score(*head, nearest=False, softmax=False)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: KERNELS.classification_margin(LOGITS[0], TARGET, None, -1),
            "logits: expected shape [N, C], got [3]",
        ),
        (
            lambda: KERNELS.classification_margin(LOGITS.int(), TARGET, None, -1),
            "logits: expected dtype float32, float64, bfloat16 or float16, got int32",
        ),
        (
            lambda: KERNELS.classification_margin(LOGITS, TARGET.int(), None, -1),
            "target: expected dtype int64, got int32",
        ),
        (
            lambda: KERNELS.classification_margin(LOGITS, TARGET[:2], None, -1),
            "target: expected shape [4] for the rows of logits, got [2]",
        ),
        (
            lambda: KERNELS.classification_margin(LOGITS, TARGET, torch.ones(2, 1), -1),
            "log_norm: expected one value, got shape [2, 1]",
        ),
        (
            lambda: score(LOGITS, torch.ones(3, 2), torch.ones(2)),
            "bias: expected shape [3] for the rows of weight, got [2]",
        ),
        (
            lambda: score(LOGITS, torch.ones(3, 2).half(), None),
            "weight: expected the dtype of logits, or float32 for bfloat16 and float16 logits, "
            "got float16 for float32 logits",
        ),
        (
            lambda: KERNELS.pair_distance(torch.ones(3, 2), None, torch.zeros(1, 3)),
            "pair: expected shape [K, 2], got [1, 3]",
        ),
        (
            lambda: KERNELS.class_sum(torch.tensor([0, 99]), torch.ones(2), LOGITS, 3),
            "key: expected values in [0, 12), got 0 to 99",
        ),
        (
            lambda: KERNELS.select_smallest(LOGITS, 1),
            "scores: expected shape [N], got [4, 3]",
        ),
    ],
)
def test_checks_say_what_came(call: Callable[[], object], text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize("classes", [2**40, 2**62, 2**63 - 1])
def test_result_that_does_not_fit_into_memory(classes: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        marginops.class_moments(LOGITS, TARGET, classes)
    text = str(caught.value)
    assert re.search("can't allocate memory|Storage size calculation overflowed", text)
    assert str(csrc_folder()) not in text
    assert "API call failed" not in text


@pytest.mark.parametrize(
    ("megabytes", "call", "reason"),
    [
        (1, "marginops.select_smallest(scores, 9_000_000)", "can't allocate memory"),
        (250, "marginops.select_smallest(scores, 9_000_000)", r"20000000 x 8 bytes"),
        (950, "marginops.class_moments(empty, classes, 50_000_000)", "400000008 bytes"),
    ],
)
def test_memory_that_is_short_inside_a_kernel(megabytes: int, call: str, reason: str) -> None:
    text = short_of_memory(megabytes, call)
    assert re.search(rf"(not enough memory: )?.*{reason}", text)
    if "bytes" in reason:
        assert text == f"not enough memory: {reason} for the working memory of a kernel"


def short_of_memory(megabytes: int, call: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY.replace("CALL", call), str(megabytes)],
        env=os.environ | {"PYTHONPATH": INSTALLED} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_older_torch_keeps_no_words(tmp_path: Path) -> None:
    """Before 2.13 torch has no function that tells the words of its last error."""
    source, library = tmp_path / "none.c", tmp_path / "none.so"
    function = "torch_exception_get_what_without_backtrace"
    source.write_text(f"const char* {function}(void) {{ return 0; }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    text = short_of_memory(1, "marginops.select_smallest(scores, 9)", LD_PRELOAD=str(library))
    assert text.startswith("not enough memory: ")
    text = short_of_memory(
        100, "marginops.select_smallest(scores, 9_000_000)", LD_PRELOAD=str(library)
    )
    assert text == (
        "not enough memory: DefaultCPUAllocator: can't allocate memory. "
        "Tried to allocate 9000000 x 1 values of dtype int64"
    )


def test_sources_use_checks_and_memory_that_have_words() -> None:
    """torch's macros put the path of a source in front. std::vector says nothing."""
    unwanted = (
        r"\bSTD_TORCH_CHECK|(?<!<)\bTORCH_BOX\(|TORCH_ERROR_CODE_CHECK|std::vector<|new_empty"
    )
    for path in sorted(csrc_folder().rglob("*")):
        if path.suffix in (".h", ".cpp") and path.name != "memory.h":
            assert not re.findall(unwanted, path.read_text()), path
