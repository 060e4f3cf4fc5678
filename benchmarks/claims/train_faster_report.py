"""What the runs of ``train_faster.py`` say: the verdict, the tables and the figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from harness.claim import Report, Row, Table
from harness.data import FASHION_MNIST, NEWSGROUPS
from harness.gains import gain, range_text
from harness.statistics import Interval, mean_sd, paired_difference, paired_ratio
from trainings.train_faster import CONVOLUTIONS, PERCEPTRON, RESIDUAL, SAMPLINGS, STALE, UNIFORM

from marginops.training import Comparison, TrainingRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = tuple[str, str]
GAIN, MANY, SOME = 1.5, 3, 1
MLP, CNN = (FASHION_MNIST, PERCEPTRON), (FASHION_MNIST, CONVOLUTIONS)
RESNET, TEXTS = (FASHION_MNIST, RESIDUAL), (NEWSGROUPS, PERCEPTRON)
TITLES = {
    MLP: "MLP on Fashion-MNIST",
    CNN: "CNN on Fashion-MNIST",
    RESNET: "residual network on Fashion-MNIST",
    TEXTS: "MLP on 20 Newsgroups",
}
# The budget of the plain run in sizes of the training set.
PLAIN = 16


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting."""
    found = {one: [row for row in rows if (row["data"], row["network"]) == one] for one in TITLES}
    return {setting: group for setting, group in found.items() if group}


def others(rows: Sequence[Row]) -> list[str]:
    """The samplings beside uniform batches, stale margins first."""
    return [one for one in SAMPLINGS[1:] if any(row["sampling"] == one for row in rows)]


def compared(rows: Sequence[Row], sampling: str) -> Comparison:
    """A sampling and uniform batches in one setting, with the seeds that both have."""
    seeds = {row["seed"] for row in rows if row["sampling"] == sampling}
    fields = ("sampling", "budget", "seed", "accuracy", "samples")
    runs = [
        TrainingRun(*(row[field] for field in (*fields, "process_seconds", "wall_seconds")))
        for row in rows
        if row["sampling"] in (UNIFORM, sampling) and row["seed"] in seeds
    ]
    return Comparison(tuple(runs), UNIFORM)


def gain_at(comparison: Comparison, sampling: str, budget: float) -> float | None:
    """The gain in CPU time at the mean accuracy of one budget; None if uniform misses it."""
    runs = [run for run in comparison.runs if (run.sampling, run.budget) == (sampling, budget)]
    uniform = comparison.cost_at(UNIFORM, float(np.mean([run.accuracy for run in runs])))
    if uniform is None:
        return None
    return uniform / float(np.mean([run.process_seconds for run in runs]))


def of_both(rows: Sequence[Row], budget: float, field: str) -> tuple[list[float], list[float]]:
    """A field of the runs of uniform batches and of stale margins, seed by seed."""
    found = {(row["sampling"], row["seed"]): row[field] for row in rows if row["budget"] == budget}
    seeds = sorted(seed for sampling, seed in found if sampling == STALE)
    return [found[UNIFORM, seed] for seed in seeds], [found[STALE, seed] for seed in seeds]


def shared_budgets(rows: Sequence[Row]) -> list[float]:
    """The budgets of both."""
    of_each = [
        {row["budget"] for row in rows if row["sampling"] == one} for one in (UNIFORM, STALE)
    ]
    return sorted(set.intersection(*of_each))


def losses(rows: Sequence[Row]) -> list[float]:
    """The budgets at which the accuracy of stale margins is below that of uniform batches.

    It is below if the 95 % interval of the difference, seed by seed, is. The smallest budget, in
    which stale margins have no choice to make, does not count.
    """
    return [
        budget
        for budget in shared_budgets(rows)[1:]
        if paired_difference(*of_both(rows, budget, "accuracy")).high < 0
    ]


def report(rows: list[Row]) -> Report:
    """The outcome is that of stale margins; the other samplings stand beside them."""
    groups = by_setting(rows)
    found = {
        setting: gain(compared(group, STALE), STALE, "process_seconds")
        for setting, group in groups.items()
    }
    values = {setting: one.value if one else 0 for setting, one in found.items()}
    reached = sum(value >= GAIN for value in values.values())
    outcome: Literal["confirmed", "partly confirmed", "not confirmed"] = "not confirmed"
    if reached >= SOME:
        outcome = "confirmed" if reached >= MANY else "partly confirmed"
    order = sorted(values, key=lambda setting: (not losses(groups[setting]), values[setting]))
    parts = [sentence(setting, groups[setting]) for setting in order]
    parts.append(f"The gain is {GAIN} or more in {reached} of {len(groups)} settings.")
    notes = [
        "A gain is the geometric mean over the accuracies, with its 95 % interval over seeds.",
        "With the same number of updates, a training with stale margins took "
        f"{relative_time(groups).text()} times the CPU time of a uniform one.",
    ]
    if left_out := [TITLES[setting] for setting in TITLES if setting not in groups]:
        notes.append(f"These runs leave out {'; '.join(left_out)}.")
    return Report(outcome, " ".join(parts), [gain_table(groups), budget_table(groups)], notes)


def relative_time(groups: dict[Setting, list[Row]]) -> Interval:
    """The CPU time of stale margins over that of uniform batches for as many updates.

    It is the geometric mean over settings and budgets of each seed.
    """
    seconds = [
        of_both(group, budget, "process_seconds")
        for group in groups.values()
        for budget in shared_budgets(group)
    ]
    uniform, stale = np.exp(np.log(seconds).mean(0))
    return paired_ratio(uniform, stale)


def sentence(setting: Setting, rows: Sequence[Row]) -> str:
    """What stale margins gain or lose in one setting."""
    comparison = compared(rows, STALE)
    seconds = gain(comparison, STALE, "process_seconds")
    start = f"With the {TITLES[setting]}, "
    if seconds is None:
        return f"{start}stale margins and uniform batches reach no common accuracy."
    if seconds.value < 1:
        start += "stale margins lose: "
    elif seconds.value < GAIN:
        start += f"the gain is below {GAIN}: "
    text = (
        f"{start}uniform batches need {seconds.text()} times the CPU time of stale margins for the "
        f"same accuracy, for accuracies from {range_text(comparison, STALE)} %."
    )
    if lower := [percent(budget) for budget in losses(rows)]:
        text += (
            f" At {' and '.join(lower)} of the plain budget, stale margins are less accurate than "
            "uniform batches with as many samples."
        )
    return text


def percent(budget: float) -> str:
    """A budget as a share of that of the plain run."""
    return f"{100 * budget / PLAIN:g} %"


def gain_table(groups: dict[Setting, list[Row]]) -> Table:
    """The gains of every sampling over uniform batches."""
    cells = []
    for setting, group in groups.items():
        for sampling in others(group):
            comparison = compared(group, sampling)
            seconds = gain(comparison, sampling, "process_seconds")
            samples = gain(comparison, sampling, "samples")
            numbers = ("-", "-", "-")
            if seconds is not None and samples is not None:
                numbers = range_text(comparison, sampling), seconds.text(), samples.text()
            cells.append((TITLES[setting], sampling, *numbers, str(len(comparison.seeds))))
    return Table(
        "CPU time and back-propagated samples that uniform batches need for the same accuracy, "
        "over those of each sampling. Above 1 the sampling needs less. Gains of two samplings "
        "compare only over the same accuracies.",
        ("setting", "sampling", "test accuracies, %", "gain in CPU time", "in samples", "seeds"),
        cells,
    )


def budget_table(groups: dict[Setting, list[Row]]) -> Table:
    """The accuracies of all samplings at each budget."""
    cells = []
    for setting, group in groups.items():
        comparison = compared(group, STALE)
        for budget in sorted({row["budget"] for row in group}):
            accuracies = []
            for sampling in SAMPLINGS:
                pair = (sampling, budget)
                own = [r["accuracy"] for r in group if (r["sampling"], r["budget"]) == pair]
                accuracies.append(mean_sd(own, scale=100) if own else "")
            found = ""
            if budget in comparison.budgets(STALE):
                value = gain_at(comparison, STALE, budget)
                found = "-" if value is None else f"{value:.2f}"
            cells.append(
                (TITLES[setting], percent(budget), *accuracies[:2], found, *accuracies[2:])
            )
    return Table(
        "Test accuracy in percent at each share of the plain budget, mean and standard deviation "
        "over seeds. The gain of stale margins is the CPU time that uniform batches need for the "
        "same mean accuracy, over that of stale margins; a dash means that uniform batches do not "
        "reach it at any budget here.",
        ("setting", "budget", UNIFORM, STALE, "gain", *SAMPLINGS[2:]),
        cells,
    )


def draw(rows: list[Row], figure: "Figure") -> None:
    """Accuracy against CPU time, a panel for each setting."""
    groups = by_setting(rows)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure.set_size_inches(5 * columns, 3.8 * lines)
    for place, (setting, group) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        compared(group, STALE).plot(axes)
        for sampling in others(group)[1:]:
            seconds, accuracies = np.transpose(compared(group, sampling).frontier(sampling))
            axes.plot(seconds, accuracies, "--", marker=".", label=sampling)
        axes.set(xlabel="CPU seconds of training", ylabel="test accuracy", title=TITLES[setting])
        axes.legend(fontsize="small")
