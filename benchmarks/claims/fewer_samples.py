"""Measure what is lost if only the smallest margins are trained on after separation.

python benchmarks/claims/fewer_samples.py            # tables, verdict, result file, figure
python benchmarks/claims/fewer_samples.py --quick    # about a minute; writes no result file
"""

import sys
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Literal

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.data import FASHION_MNIST
from harness.statistics import Interval, mean_sd, paired_difference
from trainings.fewer_samples import ANEW, CHOICES, MEAN, SHARES, SUM, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = [(False, 0.0), (False, 5e-4), (True, 0.0), (True, 5e-4)]  # batch norm, weight decay
SHARE, LIMIT = 0.005, 0.5  # of the verdict: kept samples, points of accuracy that may be lost
LOSSES = {MEAN: "mean of the kept", SUM: "sum of the kept / N"}
Value = Callable[[Row], float]

STATEMENT = (
    "After a network separates its training samples, training can go on with less than 1 % of "
    "them, those with the smallest normalised margins, without loss of test accuracy."
)

PROTOCOL = """
**Training.** A perceptron with hidden layers of 256 and 128 units learns the first 10,000 training
images of Fashion-MNIST: SGD with momentum 0.9, batches of 128, learning rate 0.05 for 25 epochs and
0.01 from then on. Separation is the end of the first epoch after which all margins are positive.
There are four conditions: with and without batch norm, with and without weight decay 5e-4.

**After separation.** From the weights and the optimizer's state at separation, training goes on for
1,000 updates at the same learning rate: with all N samples (the reference), or with M samples that
`ReductionSampler` keeps, 0.2, 0.5 and 1 % of N. These have the smallest margins, the largest, or
are random. They are chosen once, and each batch has all of them. Batch norms normalise by the
running statistics of the moment of separation, which stay as they are, also in the reference. One
norm divides all margins of a network, so it does not change which are the smallest. The later cut
does the same from a state after 4,000 more updates with all samples.

**Two losses.** "Mean of the kept" is the loss that a training loop computes by itself. Its gradient
is N/M times the part of the kept samples in the gradient of all. "Sum of the kept / N" gives each
kept sample the weight that it has in the mean of all N: training lacks the gradients of the dropped
samples, and nothing else changes. Training from scratch starts from the first weights of the same
network and has the M samples alone, for 1,000 updates at learning rate 0.05, then 0.01.

**Fixed before the runs.** The number of samples and the learning rates were chosen with seed 100,
so that all four conditions reach separation in a short time. The statistics of batch norms were
chosen with seed 100 by accuracy on the last 10,000 training images, which no run trains on: batch
norms that normalise by the smallest margins lost more, whether their running statistics followed
these samples or were taken again from all. The claim is confirmed if, at M/N = 0.5 %, at most 0.5
points are lost on average with both losses in all four conditions, and partly confirmed if this
holds in some of the eight cases.
"""


def settings(scope: Scope) -> list[Settings]:
    """A run for each seed and condition."""
    if not scope.sources.has(FASHION_MNIST):
        return []
    samples, updates, later = (2000, 150, 300) if scope.quick else (10000, 1000, 4000)
    sizes = {"samples": samples, "updates": updates, "later": later}
    return [
        {"data": FASHION_MNIST, "seed": seed, "batch_norm": norm, "weight_decay": decay} | sizes
        for seed in scope.seeds
        for norm, decay in CONDITIONS
    ]


def few(share: float, choice: str, way: str, what: str = "accuracy", at: str = "cut") -> Value:
    """The value of a row that a training on few samples has."""

    def value(row: Row) -> float:
        for one in row[at]["reduced"]:
            if (one["share"], one["choice"], one["way"]) == (share, choice, way):
                return float(one[what])
        raise KeyError((share, choice, way))

    return value


def full(when: Literal["start", "all"], what: str = "accuracy", at: str = "cut") -> Value:
    """The value of a row at the start of further training, or after it with all samples."""
    return lambda row: float(row[at][when][what])


def lost(rows: Sequence[Row], value: Value, against: Value) -> Interval:
    """The points of accuracy that are lost, run by run."""
    return paired_difference([value(row) for row in rows], [against(row) for row in rows])


def report(rows: list[Row]) -> Report:
    """Compare the accuracies of all ways to go on."""
    groups = by_condition(rows)
    complete = [row for group in groups.values() for row in group]
    if not complete:
        return Report("not confirmed", "No run reached separation.", [])
    cases = {
        way: [lost(one, few(SHARE, "smallest", way), full("all")) for one in groups.values()]
        for way in LOSSES
    }
    held = [one.value <= LIMIT for intervals in cases.values() for one in intervals]
    return Report(
        "confirmed" if all(held) else "partly confirmed" if any(held) else "not confirmed",
        verdict(complete, cases),
        [main_table(groups), shares_table(groups), facts_table(groups)],
        notes(complete, len(rows) - len(complete)),
    )


def by_condition(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each condition that reached separation, by its name."""
    groups: dict[str, list[Row]] = {}
    for row in (row for row in rows if row["separated_after"] is not None):
        parts = ["batch norm"] * row["batch_norm"] + ["weight decay"] * (row["weight_decay"] > 0)
        groups.setdefault(", ".join(parts) or "neither", []).append(row)
    return groups


def verdict(rows: Sequence[Row], cases: dict[str, list[Interval]]) -> str:
    """What is lost with each loss, the worse first, beside random samples; then other ways."""
    named = {MEAN: "mean of the kept samples", SUM: "sum of the kept samples divided by N"}

    def points(value: Value, digits: int = 2) -> str:
        return f"{lost(rows, value, full('all')).value:.{digits}f}"

    certain = [one.low > 0 for intervals in cases.values() for one in intervals]
    values = {way: [one.value for one in intervals] for way, intervals in cases.items()}
    sentences = [
        f"If the loss is the {named[way]}, the {percent(SHARE)} smallest margins lose "
        f"{points(few(SHARE, 'smallest', way))} points of test accuracy ({min(losses):.2f} to "
        f"{max(losses):.2f}, at most {LIMIT} in {sum(one <= LIMIT for one in losses)} of "
        f"{len(losses)} conditions): {comparison(rows, way)} random samples, which lose "
        f"{points(few(SHARE, 'random', way))}."
        for way, losses in sorted(values.items(), key=lambda case: -np.mean(case[1]))
    ]
    anew = [points(few(SHARE, one, ANEW), 1) for one in CHOICES[:2]]
    return (
        f"Accuracy is lost in {sum(certain)} of {len(certain)} cases, by intervals above 0. "
        f"{' '.join(sentences)} Going on with all samples gains {points(full('start'))} points "
        "over stopping at separation. From scratch, without the other samples, the smallest "
        f"margins lose {anew[0]} points and random samples {anew[1]}."
    )


def comparison(rows: Sequence[Row], way: str) -> str:
    """What the smallest margins are in comparison with random samples."""
    more = lost(rows, few(SHARE, "smallest", way), few(SHARE, "random", way))
    if more.low > 0:
        return "worse than"
    return "better than" if more.high < 0 else "neither better nor worse than"


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:g} %"


def notes(rows: Sequence[Row], missing: int) -> list[str]:
    """How to read the tables."""
    kept = round(SHARE * rows[0]["samples"])
    classes = np.mean([len(set(row["closest_target"][:kept])) for row in rows])
    texts = [
        f"{percent(SHARE)} of the samples are {kept}. Those with the smallest margins belong to "
        f"{classes:.1f} classes of 10 on average. The Jaccard index of two random sets of this "
        f"size is about {SHARE / (2 - SHARE):.3f}.",
    ]
    return texts + [f"Runs that did not reach separation do not count: {missing}."] * (missing > 0)


def main_table(groups: dict[str, list[Row]]) -> Table:
    """All ways to use the share of the verdict."""
    lines = [("no further training", "", full("start"), full("all"))]
    for way, loss in LOSSES.items():
        lines += [(one, loss, few(SHARE, one, way), full("all")) for one in CHOICES]
        both = few(SHARE, "smallest", way), few(SHARE, "random", way)
        lines.append(("smallest against random", loss, *both))
    for choice, (way, loss) in product(CHOICES[:2], LOSSES.items()):
        value = few(SHARE, choice, way, at="later")
        lines.append((f"{choice}, later cut", loss, value, full("all", at="later")))
    for one in CHOICES[:2]:
        lines.append((f"{one}, from scratch", LOSSES[MEAN], few(SHARE, one, ANEW), full("all")))
    return Table(
        f"Points of test accuracy lost with {percent(SHARE)} of the samples, against further "
        f"training with all: means over {max(map(len, groups.values()))} seeds, 95 % intervals.",
        ["Margins of the kept", "Loss", *groups],
        [
            [what, loss, *(lost(group, value, against).text() for group in groups.values())]
            for what, loss, value, against in lines
        ],
    )


def shares_table(groups: dict[str, list[Row]]) -> Table:
    """The smallest margins at all shares, against two accuracies."""
    return Table(
        "Points of test accuracy lost with the smallest margins.",
        ["M / N", "Loss", "Against", *groups],
        [
            [percent(share), loss, name]
            + [lost(group, few(share, "smallest", way), other).text() for group in groups.values()]
            for way, loss in LOSSES.items()
            for name, other in (("going on with all", full("all")), ("separation", full("start")))
            for share in SHARES
        ],
    )


def facts_table(groups: dict[str, list[Row]]) -> Table:
    """What else differs between the conditions."""
    lines: list[tuple[str, int, Value]] = [
        ("updates until separation", 0, lambda row: row["separated_after"]),
        ("test accuracy at separation, %", 2, full("start")),
        ("test accuracy after going on with all, %", 2, full("all")),
        ("growth of the smallest margins: all", 2, growth(full("all", "margin"))),
    ]
    for way, loss in LOSSES.items():
        found = [few(SHARE, "smallest", way, one) for one in ("margin", "training_accuracy")]
        lines.append((f"growth of the smallest margins: smallest, {loss}", 2, growth(found[0])))
        lines.append((f"accuracy on all N samples: smallest, {loss}, %", 2, found[1]))
    cells = [
        [what, *(mean_sd([value(row) for row in group], digits) for group in groups.values())]
        for what, digits, value in lines
    ]
    for share in SHARES:
        overlaps = [jaccard(group, share) for group in groups.values()]
        cells.append([f"Jaccard index of the smallest {percent(share)} of two seeds", *overlaps])
    return Table(
        f"M/N = {percent(SHARE)}: means and standard deviations over seeds, or pairs of seeds. "
        "Growth is the mean of the smallest hundredth of all normalised margins after further "
        "training, divided by that at separation.",
        ["", *groups],
        cells,
    )


def growth(margin: Value) -> Value:
    """A margin divided by that at separation."""
    return lambda row: margin(row) / full("start", "margin")(row)


def jaccard(rows: Sequence[Row], share: float) -> str:
    """The mean overlap of the samples with the smallest margins, over pairs of seeds."""
    sets = [set(row["closest"][: round(share * row["samples"])]) for row in rows]
    found = [len(one & other) / len(one | other) for one, other in combinations(sets, 2)]
    return mean_sd(found) if found else ""


def draw(rows: list[Row], figure: "Figure") -> None:
    """What is lost against the share of the samples: a panel for each way to train on."""
    groups = by_condition(rows)
    figure.set_size_inches(10, 3.8)
    titles = {way: f"after separation,\n{loss}" for way, loss in LOSSES.items()}
    titles[ANEW] = f"from scratch,\n{LOSSES[MEAN]}"
    colors = {"smallest": "tab:red", "random": "tab:blue", "largest": "tab:green"}
    shares = [100 * share for share in SHARES]
    for ax, (way, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for choice in CHOICES if way in LOSSES else CHOICES[:2]:
            values = [few(share, choice, way) for share in SHARES]
            lines = np.array(
                [
                    [lost(group, one, full("all")).value for one in values]
                    for group in groups.values()
                ]
            )
            for line in lines:
                ax.plot(shares, line, color=colors[choice], linewidth=0.8, alpha=0.5)
            ax.plot(shares, lines.mean(0), "o-", color=colors[choice], linewidth=2, label=choice)
        ax.axhline(LIMIT, color="black", linestyle=":", linewidth=1, label=f"{LIMIT} points")
        ax.set(title=title, xlabel="kept samples M / N, %", xscale="log")
        ax.set_xticks(shares, [f"{one:g}" for one in shares])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("points of test accuracy lost\nagainst going on with all")
    entries = figure.axes[0].get_legend_handles_labels()
    figure.legend(*entries, title="margins\n(thin: a condition)", loc="outside right upper")


CLAIM = Claim(
    name="fewer_samples",
    title="Further training with less than 1 % of the samples",
    statement=STATEMENT,
    source="Banburski et al. 2021",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
)


if __name__ == "__main__":
    sys.exit(main(CLAIM))
