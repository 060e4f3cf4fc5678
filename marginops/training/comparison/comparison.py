"""Compares samplings at several budgets by the cost that they need for the same accuracy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ... import _checks as checks
from .frontier import Array, Frontier, Gain, Pair, t_width
from .runs import Train, TrainingRun, train_all

Cost = Literal["process_seconds", "wall_seconds", "samples"]
_UNITS = {"process_seconds": "CPU s", "wall_seconds": "s", "samples": "samples"}
_LABELS = {
    "process_seconds": "process time of training in seconds",
    "wall_seconds": "time of training in seconds",
    "samples": "back-propagated samples",
}


def compare(
    train: Train,
    samplings: Sequence[str],
    budgets: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    seeds: int | Sequence[int] = 5,
    baseline: str | None = None,
    warm_up: bool = True,
    on_run: Callable[[TrainingRun], object] | None = None,
) -> "Comparison":
    """Train with several samplings at several budgets, and compare the costs of equal accuracy.

    A sampling that needs fewer updates may still need more time, and a run that is cut off before
    its learning rate has decayed is no baseline. So every budget is a training of its own, whose
    schedule ends with its budget. The result tells how much the baseline costs for the accuracy
    that a sampling reaches, over what the sampling costs.

    Args:
        train: ``train(sampling, budget, seed, stopwatch)`` trains a new network, and returns its
            accuracy and the number of samples it back-propagated. It lets the learning rate decay
            to its end within ``budget``. It puts the training into ``with stopwatch:`` and leaves
            the evaluation out; several blocks add up. Without a block the whole call counts.
        samplings: The names that ``train`` knows, at least one.
        budgets: Positive numbers that ``train`` knows as budgets, for example numbers of epochs.
            A mapping gives each sampling budgets of its own. The baseline needs them large enough
            to reach the accuracies of the others.
        seeds: The seeds, or their number S for 0 to S - 1. A seed is the same for all samplings.
        baseline: One of ``samplings``. The default is the first.
        warm_up: Train once with each sampling at the smallest budget, and leave these runs out. The
            first run of a process pays for imports and compiled kernels.
        on_run: A function that is called with each :class:`TrainingRun`.

    Returns:
        :class:`Comparison`. The samplings take turns, so that a machine that becomes slower is
        slower for all.

    Raises:
        TypeError, ValueError: An argument or a result of ``train`` has the wrong type or range.

    Process time depends on the number of threads; set it with :func:`torch.set_num_threads`. The
    accuracy is what ``train`` returns. If it belongs to the test set, choose nothing by it.

    Example:
        >>> import torch
        >>> from marginops.training import compare
        >>> def train(sampling, budget, seed, stopwatch):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     inputs = torch.randn(800, 8, generator=generator)
        ...     target = (inputs.sum(1) > 0).long()
        ...     network, steps = torch.nn.Linear(8, 2), 10 * budget
        ...     optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        ...     schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        ...     with stopwatch:
        ...         for step in range(steps):
        ...             optimizer.zero_grad()
        ...             logits = network(inputs[:400])
        ...             torch.nn.functional.cross_entropy(logits, target[:400]).backward()
        ...             optimizer.step()
        ...             schedule.step()
        ...     accuracy = (network(inputs[400:]).argmax(1) == target[400:]).double().mean()
        ...     return accuracy.item(), 400 * steps
        >>> comparison = compare(train, ["all"], budgets=[1, 2], seeds=2)
        >>> [(run.budget, run.seed, run.samples) for run in comparison.runs]
        [(1, 0, 4000), (2, 0, 8000), (1, 1, 4000), (2, 1, 8000)]
    """
    if baseline is not None and not isinstance(samplings, str):
        checks.check_choice("baseline", baseline, list(samplings))
    runs = train_all(train, samplings, budgets, seeds, warm_up, on_run)
    return Comparison(runs, runs[0].sampling if baseline is None else baseline)


@dataclass(frozen=True)
class Comparison:
    """The runs of :func:`compare`, and what they say. All budgets have the same seeds.

    Attributes:
        runs: The runs. ``Comparison(tuple(TrainingRun(**row) for row in rows), baseline)`` makes
            a comparison of saved rows.
        baseline: The name of the sampling that the others are compared with.
    """

    runs: tuple[TrainingRun, ...]
    baseline: str

    def __post_init__(self) -> None:
        """Check that the runs are complete and that the baseline is there."""
        if not self.runs:
            raise ValueError("runs: expected one or more runs, got none")
        checks.check_choice("baseline", self.baseline, self.samplings)
        keys = [(run.sampling, run.budget, run.seed) for run in self.runs]
        full = {(sampling, budget, i) for sampling, budget, _ in keys for i in self.seeds}
        if len(keys) != len(full) or set(keys) != full:
            raise ValueError(
                f"runs: expected one run of each seed for each budget, {len(full)} in all, "
                f"got {len(keys)} runs of which {len(set(keys))} differ"
            )

    @property
    def samplings(self) -> tuple[str, ...]:
        """The names of the samplings, in the order of the runs."""
        return tuple(dict.fromkeys(run.sampling for run in self.runs))

    def budgets(self, sampling: str) -> tuple[float, ...]:
        """The budgets of a sampling in ascending order."""
        checks.check_choice("sampling", sampling, self.samplings)
        return tuple(sorted({run.budget for run in self.runs if run.sampling == sampling}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds in ascending order."""
        return tuple(sorted({run.seed for run in self.runs}))

    def to_rows(self) -> list[dict[str, Any]]:
        """The runs as dictionaries, for JSON or a table of pandas."""
        return [asdict(run) for run in self.runs]

    def frontier(self, sampling: str, cost: Cost = "process_seconds") -> list[tuple[float, float]]:
        """Mean cost and mean accuracy of each budget, in ascending order of budgets.

        Where a mean falls although the budget rises, the least-squares fit that does not fall takes
        its place (isotonic regression).

        Args:
            sampling: One of ``samplings``.
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.
        """
        line = Frontier(*self._values(sampling, cost))
        return list(zip(np.exp(line.log_costs).tolist(), line.accuracies.tolist(), strict=True))

    def cost_at(
        self, sampling: str, accuracy: float, cost: Cost = "process_seconds"
    ) -> float | None:
        """The smallest cost that reaches an accuracy on the :meth:`frontier` of a sampling.

        Between two budgets the accuracy is linear in the logarithm of the cost.

        Args:
            sampling: One of ``samplings``.
            accuracy: A mean accuracy.
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.

        Returns:
            The cost. It is None if the accuracy is outside the frontier: nothing is extrapolated.
        """
        line = Frontier(*self._values(sampling, cost))
        if not line.accuracies[0] <= accuracy <= line.accuracies[-1]:
            return None
        return float(np.exp(line.log_cost(np.array(accuracy))))

    def accuracy_range(self, sampling: str, cost: Cost = "process_seconds") -> tuple[float, float]:
        """The accuracies for which :meth:`gain` is defined.

        The baseline and the sampling reach them at some budget between their smallest and largest,
        with all seeds and without any one of them. There are none if the first is above the second.

        Args:
            sampling: One of ``samplings``.
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.
        """
        return self._pair(sampling, cost).accuracy_range

    def gain(
        self,
        sampling: str,
        lowest_accuracy: float | None = None,
        highest_accuracy: float | None = None,
        *,
        cost: Cost = "process_seconds",
        confidence: float = 0.95,
    ) -> Gain:
        """How much more the baseline costs than a sampling, for the same accuracy.

        Args:
            sampling: One of ``samplings``.
            lowest_accuracy: The lower end of the range. The default is that of
                :meth:`accuracy_range`.
            highest_accuracy: The upper end; the same number twice asks for one accuracy.
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.
            confidence: The confidence of the interval.

        Returns:
            :class:`Gain`: the geometric mean of the ratio over the range, and its interval. The
            interval is a t interval of the logarithm by the jackknife over seeds. It needs SciPy.

        Raises:
            ValueError: The range is not inside :meth:`accuracy_range`. Nothing is extrapolated.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
        pair = self._pair(sampling, cost)
        least, most = pair.accuracy_range
        lowest = least if lowest_accuracy is None else lowest_accuracy
        highest = most if highest_accuracy is None else highest_accuracy
        if not least <= lowest <= highest <= most:
            covered = f"inside [{least:.6g}, {most:.6g}]"
            if least > most:
                covered = f"that {self.baseline} and {sampling} both reach, but there are none"
            raise ValueError(
                f"lowest_accuracy, highest_accuracy: expected accuracies {covered}, "
                f"got [{lowest:.6g}, {highest:.6g}]; other budgets cover other accuracies"
            )
        return pair.gain(lowest, highest, confidence)

    def to_text(self, cost: Cost = "process_seconds") -> str:
        """A table: cost, accuracy and gain of each sampling at each budget.

        Accuracies are means over seeds with their 95 % t interval. A single seed has no intervals.
        The gain of a row is the cost of the baseline for the accuracy of this row, over the cost of
        this row; a dash where the baseline does not reach this accuracy. The last lines are the
        gains over the whole :meth:`accuracy_range`.

        Args:
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.
        """
        checks.check_choice("cost", cost, list(_UNITS))
        rows = [("sampling", "budget", "samples", _UNITS[cost], "accuracy", "gain")]
        ends = []
        for sampling in self.samplings:
            costs, accuracies = self._values(sampling, cost)
            samples = self._values(sampling, "samples")[0].mean(0)
            means, widths = accuracies.mean(0), t_width(accuracies)
            is_baseline, pair = sampling == self.baseline, self._pair(sampling, cost)
            for i, budget in enumerate(self.budgets(sampling)):
                reached = f"{means[i]:.4f}"
                if len(self.seeds) > 1:
                    reached += f" +- {widths[i]:.4f}"
                at = None if is_baseline else pair.gain_at(i, 0.95)
                gain = "" if is_baseline else _interval(at)
                numbers = f"{budget:g}", f"{samples[i]:.0f}", f"{costs[:, i].mean():.4g}"
                rows.append((sampling, *numbers, reached, gain))
            if not is_baseline:
                least, most = pair.accuracy_range
                end = f"no accuracy that {self.baseline} reaches as well"
                if least <= most:
                    gain = _interval(pair.gain(least, most, 0.95))
                    end = f"gain {gain}, accuracies from {least:.4f} to {most:.4f}"
                ends.append(f"{sampling}: {end}")
        lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, lengths)).rstrip() for row in rows)
        return "\n".join([*lines, *ends])

    def plot(self, ax: Any = None, *, cost: Cost = "process_seconds") -> tuple[Any, Any]:
        """Plot the accuracy of each sampling against its cost, with 95 % t intervals over seeds.

        Args:
            ax: Axes of matplotlib to draw into. By default the method makes new axes.
            cost: ``"process_seconds"``, ``"wall_seconds"`` or ``"samples"``.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        checks.check_choice("cost", cost, list(_UNITS))
        try:
            from matplotlib import pyplot, ticker
        except ModuleNotFoundError as error:
            raise ImportError("plot needs matplotlib; run pip install matplotlib") from error
        if ax is None:
            ax = pyplot.subplots()[1]
        for sampling in self.samplings:
            costs, accuracies = self._values(sampling, cost)
            mean = costs.mean(0)
            order = np.argsort(mean)
            ax.errorbar(
                mean[order],
                accuracies.mean(0)[order],
                t_width(accuracies)[order],
                marker="o",
                capsize=3,
                label=sampling,
            )
        ax.legend()
        ax.set(xscale="log", xlabel=_LABELS[cost], ylabel="accuracy")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        return ax.get_figure(), ax

    def _values(self, sampling: str, cost: Cost) -> tuple[Array, Array]:
        """Costs and accuracies ``[S, B]`` of a sampling."""
        checks.check_choice("cost", cost, list(_UNITS))
        budgets = self.budgets(sampling)
        runs = {(r.seed, r.budget): r for r in self.runs if r.sampling == sampling}
        ordered = [[runs[seed, budget] for budget in budgets] for seed in self.seeds]
        costs = np.array([[getattr(run, cost) for run in row] for row in ordered], np.float64)
        if not (costs > 0).all():
            raise ValueError(f"cost: expected positive {cost} of {sampling}, got {costs.min()}")
        return costs, np.array([[run.accuracy for run in row] for row in ordered], np.float64)

    def _pair(self, sampling: str, cost: Cost) -> Pair:
        return Pair(self._values(self.baseline, cost), self._values(sampling, cost))


def _interval(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    ends = "" if math.isnan(gain.low) else f" ({gain.low:.2f} to {gain.high:.2f})"
    return f"{gain.value:.2f}{ends}"
