"""Cases of the selection kernels."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from helpers import brute_force
from helpers.emulation.harness import Case
from helpers.emulation.tensors import DTYPES, LAYOUTS, VALUES, Checked, filled, laid_out


def selection_scores(small: bool) -> Iterator[tuple[Tensor, int, str]]:
    """Scores of all dtypes, layouts and kinds, how many to select, and a label."""
    counts = [1, 2, 3, 31, 32, 33, 100, 255, 256, 257, 1000, 1023, 1024, 1025, 4096, 5000, 20011]
    counts = [1, 33, 257, 4097] if small else [*counts, 70001]
    number = itertools.count()
    for n in counts:
        shares = {1, n // 2} if small else {0, 1, min(n, 33), n // 10, n // 2, n - 1, n}
        for k in sorted(shares):
            seed = next(number)
            dtype, layout = DTYPES[seed % 4], LAYOUTS[seed // 4 % 4]
            kind = VALUES[(seed + seed // 7) % 7]
            scores = laid_out(filled((n,), dtype, kind, seed), layout)
            yield scores, k, f"{dtype} [{n}] k={k} {layout} {kind}"


def select_sorted(fits: Callable[[int, int], bool], small: bool = False) -> Iterator[Checked]:
    """Selection by one block."""
    for scores, k, label in selection_scores(small):
        if fits(len(scores), k):
            yield sorted_case(scores, k, label)


def sorted_case(scores: Tensor, k: int, label: str) -> Checked:
    """One selection by one block."""

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = torch.tensor(
            brute_force.select_smallest(scores.double().tolist(), k), dtype=torch.int64
        )
        assert outputs["index"].tolist() == wanted.tolist()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]
        chosen = scores[wanted].clone()
        assert outputs["values"].view(bits).tolist() == chosen.view(bits).tolist()

    outputs = {"values": (scores.dtype, (k,)), "index": (torch.int64, (k,))}
    return Checked(Case("select_sorted", {"k": k}, {"scores": scores}, outputs), check, label)


def select_unsorted(small: bool = False) -> Iterator[Checked]:
    """Selection by several blocks."""
    for scores, k, label in selection_scores(small):
        yield unsorted_case(scores, k, label)


def unsorted_case(scores: Tensor, k: int, label: str) -> Checked:
    """One selection by several blocks: chosen in the order of index, sorted by key afterwards."""

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = brute_force.select_smallest(scores.double().tolist(), k)
        assert outputs["index"].tolist() == sorted(wanted)
        by_key = outputs["key"].sort(stable=True).indices
        assert outputs["index"][by_key].tolist() == wanted

    dtype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    outputs = {"key": (dtype, (k,)), "index": (torch.int64, (k,))}
    return Checked(Case("select_unsorted", {"k": k}, {"scores": scores}, outputs), check, label)
