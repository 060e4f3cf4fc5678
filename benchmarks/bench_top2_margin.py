"""Margins of logits and of probabilities against PyTorch code and libraries of active learning.

The other libraries get the probabilities for nothing: only marginops and PyTorch start from logits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import marginops
from conftest import DEVICE, PROVIDERS, compiled, peer

DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
SHAPES = [(1280, 10), (1280, 100), (8192, 1000), (1_000_000, 10), (1_000_000, 100)]
# For a GPU: logits larger than the cache in short, long and few rows.
LARGE = [(10_000_000, 10), (1_000_000, 100), *((2**27 // c, c) for c in (1024, 8192, 131_072))]
GPU_SHAPES = [*SHAPES[:2], *LARGE, (4, 1_000_000)]
LOGITS, PROBABILITIES, SELECTION = (
    "minimal_margin_score of logits",
    "minimal_margin_score of probabilities",
    "select_minimal_margin of probabilities",
)


def eager_logits(logits: Tensor) -> Tensor:
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return first - second


def eager_probabilities(logits: Tensor) -> Tensor:
    return eager_logits(logits.softmax(1))


def eager_selection(logits: Tensor) -> tuple[Tensor, Tensor]:
    return eager_probabilities(logits).topk(len(logits) // 10, largest=False)


EAGER = {LOGITS: eager_logits, PROBABILITIES: eager_probabilities, SELECTION: eager_selection}
OURS = {
    LOGITS: marginops.minimal_margin_score,
    PROBABILITIES: lambda logits: marginops.minimal_margin_score(logits, softmax=True),
    SELECTION: lambda logits: marginops.select_minimal_margin(
        logits, k=len(logits) // 10, softmax=True
    ),
}


class KnownProbabilities:
    """A classifier of other libraries whose samples are their own probabilities."""

    @staticmethod
    def predict_proba(samples: np.ndarray) -> np.ndarray:
        return samples


def modal(op: str, probabilities: np.ndarray) -> Any:
    from modAL.uncertainty import classifier_margin, margin_sampling

    if op == PROBABILITIES:
        return classifier_margin(KnownProbabilities, probabilities)
    chosen, scores = margin_sampling(
        KnownProbabilities, probabilities, n_instances=len(probabilities) // 10
    )
    return scores, chosen


def small_text(op: str, probabilities: np.ndarray) -> Any:
    from small_text import BreakingTies

    every, none = np.arange(len(probabilities)), np.array([], dtype=int)
    pool = (probabilities, every, none, none)
    if op == PROBABILITIES:
        return BreakingTies().get_confidence(KnownProbabilities, *pool)
    return None, BreakingTies().query(KnownProbabilities, *pool, n=len(probabilities) // 10)


def cleanlab(op: str, probabilities: np.ndarray) -> Any:
    from cleanlab.rank import get_normalized_margin_for_each_label

    return 2 * get_normalized_margin_for_each_label(probabilities.argmax(1), probabilities) - 1


PEERS = {"modal": modal, "small_text": small_text, "cleanlab": cleanlab}


def provided(provider: str, op: str, logits: Tensor) -> Callable[[], Any]:
    if provider in PEERS:
        probabilities = logits.float().softmax(1).cpu().numpy()
        return lambda: PEERS[provider](op, probabilities)
    if provider == "floor":
        return lambda: logits.amax(1)
    ours = {"marginops": OURS, "eager": EAGER}.get(provider)
    call = ours[op] if ours else compiled(EAGER[op])
    return lambda: call(logits)


@pytest.mark.parametrize("provider", [*PROVIDERS, *PEERS, "floor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES if DEVICE == "cpu" else GPU_SHAPES)
@pytest.mark.parametrize("op", EAGER)
def bench_top2_margin(time_call, op, shape, dtype, provider):
    rows, classes = shape
    if DEVICE != "cpu" and (provider == "floor" or (provider == "compile" and rows > 10_000)):
        pytest.skip("on a GPU a copy is the floor, and few shapes are worth compiling for")
    if provider in PEERS and op == LOGITS:
        pytest.skip("the other libraries compute margins of probabilities")
    if provider == "cleanlab" and op == SELECTION:
        pytest.skip("cleanlab scores and does not select")
    if provider in PEERS and rows > 100_000:
        pytest.skip("one call of another library takes seconds")
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    margin = eager_logits if op == LOGITS else eager_probabilities
    exact = torch.cat([margin(part.double()) for part in logits.split(100_000)])
    least = exact.sort().values[: rows // 10]
    rounding = 1e-5 if dtype == torch.float32 else 2e-2

    def close(scores, expected):
        # Others subtract probabilities that have been rounded, so only their error is absolute.
        scores = torch.as_tensor(scores, device=DEVICE).double()
        absolute = 0 if provider == "marginops" else rounding
        torch.testing.assert_close(scores, expected, rtol=rounding, atol=absolute)

    def check(result):
        if provider == "floor":
            return
        if op != SELECTION:
            return close(result, exact)
        scores, chosen = result
        chosen = torch.as_tensor(chosen, device=DEVICE)
        close(exact[chosen].sort().values, least)
        if scores is not None:
            close(scores, exact[chosen])

    call = provided(provider, op, logits)
    if provider in PEERS:
        peer(provider, call, check)
    time_call(
        call,
        check,
        op=op,
        shape=f"{rows} x {classes}",
        dtype=dtype,
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
        other_bytes=12 * (rows // 10) if op == SELECTION else 4 * rows,
    )
