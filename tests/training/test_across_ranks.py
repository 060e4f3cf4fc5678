"""The k smallest scores of all ranks: which, in which order, and with which gradients."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import marginops
from helpers import brute_force
from helpers.ranks import ranks_fixture
from marginops.training import score_batch, select_across_ranks

STEPS = 4


ranks = ranks_fixture(2, 3)


def select(groups: Any, arguments: dict[str, Any]) -> Any:
    return select_across_ranks(**{"group": groups[0], **arguments})


def select_in_default_group(groups: Any, arguments: dict[str, Any]) -> Any:
    return select_across_ranks(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_selection_is_that_of_one_process(ranks, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for sizes in ([5, 9, 1], [1, 40, 7]):
        parts = []
        for size in sizes[: ranks.count]:
            scores = torch.randint(0, 6, (size,), generator=generator).to(dtype) / 4
            parts.append(torch.where(scores > 1.2, torch.nan, scores))
        everything = [value for part in parts for value in part.tolist()]
        order = brute_force.select_smallest(everything, len(everything))
        owners = [(rank, row) for rank, part in enumerate(parts) for row in range(len(part))]
        for k, skip, least in [(0, 0, 2), (1, 0, 0), (4, 1, 2), (len(order) - 2, 2, 3)]:
            options = {"k": k, "skip": skip, "least_rows": least}
            selections = ranks.results(select, [{"scores": p, **options} for p in parts])
            chosen = order[skip : skip + k]
            for rank, (indices, weights, ids) in enumerate(selections):
                own = [owners[position][1] for position in chosen if owners[position][0] == rank]
                size = len(parts[rank])
                rest = brute_force.select_smallest(parts[rank].tolist(), size)
                rest = [row for row in rest if row not in own][: max(least - len(own), 0)]
                assert ids.tolist() == chosen and ids.dtype == torch.int64
                assert indices.tolist() == own + rest and indices.dtype == torch.int64
                factor = torch.tensor(ranks.count / max(k, 1), dtype=weights.dtype).item()
                assert weights.tolist() == [factor] * len(own) + [0] * len(rest)


def test_ids_are_not_rounded_to_the_dtype_of_the_scores(ranks) -> None:
    """257 is no bfloat16, and 2^53 + 1 is no float64."""
    ids = [torch.tensor([257 + rank, 2**53 + 1 + rank]) for rank in range(ranks.count)]
    scores = torch.zeros(2, dtype=torch.bfloat16)
    arguments = [{"scores": scores, "k": 2 * ranks.count, "ids": own} for own in ids]
    for selection in ranks.results(select_in_default_group, arguments):
        assert torch.equal(selection.ids, torch.cat(ids))


def network(with_batch_norm: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8) if with_batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 4)).double()


def train_rank(groups: Any, argument: tuple[list[Tensor], list[Tensor], int, bool]) -> Any:
    """Trains on the rank's share; returns parameters, buffers and the sizes of the shares."""
    inputs, targets, k, with_batch_norm = argument
    model = DistributedDataParallel(network(with_batch_norm), process_group=groups[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sizes = []
    for x, y in zip(inputs, targets, strict=True):
        chosen = select_across_ranks(score_batch(model, x), k, group=groups[0])
        losses = F.cross_entropy(model(x[chosen.indices]), y[chosen.indices], reduction="none")
        optimizer.zero_grad()
        (losses * chosen.weights).sum().backward()
        optimizer.step()
        sizes.append(int(chosen.weights.count_nonzero()))
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    return state, sizes


def data(count: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """For each rank the candidates of every step; those of the last rank have large margins."""
    generator = torch.Generator().manual_seed(2)
    sizes = [11, 6, 17][:count]
    inputs = [
        [torch.randn(size, 6, dtype=torch.float64, generator=generator) for _ in range(STEPS)]
        for size in sizes
    ]
    inputs[-1] = [1e3 * x for x in inputs[-1][:-1]] + inputs[-1][-1:]
    targets = [
        [torch.randint(4, (size,), generator=generator) for _ in range(STEPS)] for size in sizes
    ]
    return inputs, targets


@pytest.mark.parametrize("k", [1, 5])
def test_data_parallel_training_is_that_of_one_process(ranks, k) -> None:
    inputs, targets = data(ranks.count)
    arguments = [(x, y, k, False) for x, y in zip(inputs, targets, strict=True)]
    answers = ranks.results(train_rank, arguments)
    sizes = torch.tensor([sizes for _, sizes in answers])
    assert sizes.sum(0).tolist() == [k] * STEPS
    assert (sizes == 0).any(), "no rank without a selected sample was tested"

    model = network(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        x = torch.cat([own[step] for own in inputs])
        y = torch.cat([own[step] for own in targets])
        rows = marginops.select_smallest(score_batch(model, x), k).indices
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    for state, _ in answers:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-13)


def test_a_rank_without_a_selected_sample_neither_hangs_nor_spoils_batch_norm(ranks) -> None:
    inputs, targets = data(ranks.count)
    arguments = [(x, y, 1, True) for x, y in zip(inputs, targets, strict=True)]
    for state, _ in ranks.results(train_rank, arguments):
        assert all(value.isfinite().all() for value in state.values())


SCORES = torch.arange(3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": SCORES.long()}, "scores: expected dtype"),
        ({"scores": SCORES[:0]}, "scores: expected at least one candidate on each rank, got none"),
        ({"scores": SCORES.double()}, r"scores \(dtype\): expected the same on every rank"),
        ({"k": 1}, "k: expected the same on every rank of group, got "),
        ({"k": -1}, "k: expected at least 0, got -1"),
        ({"k": 0.5}, "k: expected an int, got float"),
        ({"skip": 1}, "skip: expected the same on every rank"),
        ({"skip": -1}, "skip: expected at least 0, got -1"),
        ({"least_rows": None}, "least_rows: expected an int, got NoneType"),
        ({"ids": SCORES}, r"ids: expected an int64 .* got torch\.float32; ids of another dtype"),
        ({"ids": [1, 2, 3]}, "ids: expected an int64 tensor .* got list"),
        ({"ids": torch.arange(2)}, r"ids: expected an int64 .*\[3\] as scores, got \[2\]"),
        ({"ids": torch.arange(3)}, r"ids \(given\): expected the same on every rank"),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_every_rank(ranks, wrong, message) -> None:
    right = {"scores": SCORES, "k": 2}
    arguments = [copy.copy(right) for _ in range(ranks.count)]
    arguments[-1].update(wrong)
    answers = ranks(select, arguments)
    for answer in answers:
        assert isinstance(answer, (TypeError, ValueError))
        with pytest.raises((TypeError, ValueError), match=message):
            raise answer


def test_k_above_all_candidates_is_an_error_on_every_rank(ranks) -> None:
    count = 3 * ranks.count
    arguments = [{"scores": SCORES, "k": count, "skip": 1}] * ranks.count
    for answer in ranks(select, arguments):
        assert isinstance(answer, ValueError)
        assert f"k: expected 0 <= k <= {count - 1} (the number of candidates of all" in str(answer)


def test_one_process_needs_no_group(device) -> None:
    scores = torch.tensor([3.0, 1.0, torch.nan, 1.0], device=device)
    indices, weights, ids = select_across_ranks(scores, 2)
    assert indices.tolist() == ids.tolist() == [1, 3]
    assert weights.tolist() == [0.5, 0.5] and weights.dtype == torch.float32
    assert {indices.device.type, weights.device.type, ids.device.type} == {scores.device.type}
    one = select_across_ranks(scores.double(), 1, skip=1, ids=torch.tensor([9, 8, 7, 6]))
    assert one.indices.tolist() == [3, 1] and one.weights.tolist() == [1, 0]
    assert one.ids.tolist() == [6] and one.weights.dtype == torch.float64
