"""The state of neural collapse, and how two states merge."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._collapse_fault import collapse_fault
from ._scatter import Scatter
from ._second_pass import SecondPass
from ._state import CheckedMetric, State


class CollapseState(CheckedMetric):
    """The state of :class:`marginops.metrics.NeuralCollapse`, from its arguments."""

    own_states = (
        *("count", "mean", "within_scatter", "weight", "has_weight"),
        *("centers", "has_centers", "compared", "differing", "ratio"),
    )

    count: Tensor
    mean: Tensor
    within_scatter: Tensor
    weight: Tensor
    has_weight: Tensor
    centers: Tensor
    has_centers: Tensor
    compared: Tensor
    differing: Tensor
    ratio: Tensor

    def __init__(self, arguments: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(arguments, **kwargs)
        self.num_classes: int = arguments["num_classes"]
        self.num_features: int = arguments["num_features"]
        self.two_passes: bool = arguments["two_passes"]
        self.ignore_index: int = arguments["ignore_index"]
        self._second_pass: SecondPass | None = None
        zeros = torch.zeros(self.num_classes, self.num_features, dtype=torch.float64)
        no = torch.tensor(False)
        # The states of the first pass. torchmetrics stacks states without a reduction over
        # processes.
        self.add_state("count", torch.zeros(self.num_classes, dtype=torch.int64), persistent=True)
        self.add_state("mean", zeros, persistent=True)
        if not self.two_passes:
            within = zeros.new_zeros(self.num_features, self.num_features)
            self.add_state("within_scatter", within, persistent=True)
        self.add_state("weight", zeros * torch.nan, persistent=True)
        self.add_state("has_weight", no, persistent=True)
        # The states of the second pass.
        self.add_state("centers", zeros * torch.nan, persistent=True)
        self.add_state("has_centers", no.clone(), persistent=True)
        self.add_state("compared", torch.tensor(0), dist_reduce_fx="sum", persistent=True)
        self.add_state("differing", zeros.new_zeros(()), dist_reduce_fx="sum", persistent=True)
        if self.two_passes:
            self.add_state("ratio", zeros.new_zeros(()), dist_reduce_fx="sum", persistent=True)

    def _forward_reduce_state_update(self, *args: Any, **kwargs: Any) -> Any:
        # In a merge nobody knows which state is the later one, whose weight counts.
        return self._forward_full_state_update(*args, **kwargs)

    def _merged(self, earlier: State, later: State) -> State:
        # Here nobody knows which state came last. So different weights count as none.
        first, second = earlier["weight"], later["weight"]
        same = ((first == second) | (first.isnan() & second.isnan())).all()
        has_both = earlier["has_weight"] & later["has_weight"]
        weight = torch.where(later["has_weight"], second, first)
        return {
            **self._first_pass(earlier, later),
            "weight": torch.where(has_both & ~same, torch.nan, weight),
            "has_weight": earlier["has_weight"] | later["has_weight"],
            "centers": self.centers,
            "has_centers": torch.zeros_like(self.has_centers),
            **{name: getattr(self, name) for name in self._sums()},
        }

    def _merged_in_order(self, earlier: State, later: State) -> State:
        last = later if later["has_weight"] else earlier
        return {
            **self._first_pass(earlier, later),
            **{name: last[name] for name in ("weight", "has_weight")},
            **_merged_second_pass(earlier, later),
        }

    def _first_pass(self, earlier: State, later: State) -> State:
        return dict(Scatter.of(earlier).merge(Scatter.of(later)).state())

    def _value_fault(self, state: Mapping[str, Any]) -> str | None:
        return collapse_fault(state)

    def _scatter(self) -> Scatter:
        """The sums over all processes, whose states torchmetrics stacks when it gathers them."""
        scatter = Scatter.of(self.metric_state)
        if self.count.dim() == 1:
            return scatter
        stacked = scatter.state()
        ranks = (
            Scatter.of({name: value[rank] for name, value in stacked.items()})
            for rank in range(len(self.count))
        )
        return functools.reduce(Scatter.merge, ranks)

    def _sums(self) -> list[str]:
        """The states that the second pass sums up."""
        return ["compared", "differing", *(["ratio"] if self.two_passes else [])]

    def _comparison(self) -> SecondPass:
        """What the second pass needs of the means, which it keeps until they change."""
        if self._second_pass is None or self._second_pass.centers is not self.centers:
            self._second_pass = SecondPass(self.centers)
        return self._second_pass

    def _fix_centers(self) -> None:
        """Keep the means of all processes, and start to count from 0."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            centers = self._scatter().means()
        self.centers = centers
        self.has_centers = torch.ones_like(self.has_centers)
        for name in self._sums():
            setattr(self, name, torch.zeros_like(getattr(self, name)))


def _merged_second_pass(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The second pass over the samples of two states: both, that of one, or a new one."""
    sums = [name for name in ("compared", "differing", "ratio") if name in later]
    for own, other in ((earlier, later), (later, earlier)):
        if not other["has_centers"] and not other["count"].any():  # the means stay as they are
            return {name: own[name] for name in ("centers", "has_centers", *sums)}
    both = earlier["has_centers"] & later["has_centers"]
    same = both & torch.eq(earlier["centers"], later["centers"]).all()
    return {
        "centers": earlier["centers"],
        "has_centers": same,
        **{name: earlier[name] + later[name] for name in sums},
    }
