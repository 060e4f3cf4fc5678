"""Classes contract, then expand: is the turning point the same in every training?

The claim trains many small networks on the parity of the label. It looks at the epoch at which the
radius of a class stops falling, at the samples that are misclassified there, and at trainings
without these samples.

    python benchmarks/claims/inversion.py --quick
    python benchmarks/claims/inversion.py
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.data import FASHION_MNIST, MNIST
from harness.statistics import Interval, mean_sd, paired_difference
from trainings.inversion import FIRST_EPOCH, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATEMENT = (
    "In training, the radius of a class in the hidden layer first shrinks and then grows. At this "
    "inversion point the training error hardly depends on the seed. The samples that are "
    "misclassified there, the stragglers, are nearly the same in all runs, and the runs agree on "
    "what they misclassify more than at other epochs. Without the stragglers the radius shrinks "
    "all the time, and the test error is higher."
)
PROTOCOL = """
The network is the authors': one hidden layer of 20 tanh units, two logits, cross-entropy, one step
an epoch with all images. The target is whether the label is even. A run draws 8,192 training
images, standardises every pixel over them, and trains 12 networks that differ in their initial
weights alone, with SGD for 400 epochs (learning rate 0.1, no momentum). There are ten draws.
`class_moments` gives the radius of the even class after every epoch, for hidden vectors of length
1. `InversionMonitor` finds the inversion: the first epoch from 20 on at which the radius does not
fall. The stragglers are the training images that are misclassified then. `straggler_stability`
is z: how much more often than by chance two networks of a draw misclassify the same images at the
same epoch, in standard deviations over all pairs. The curves have an epoch every 15 %.

Four networks of each draw are trained again from the same initial weights: without their own
stragglers, and without as many random images. The test error is that of all test images after the
last epoch. Intervals of 95 % come from a bootstrap over the draws. The other optimizers train four
networks on four draws; momentum is 0.9. An eleventh draw, which is not reported, fixed the numbers
of epochs and the learning rates, so that inversions come after epoch 20 and before the end.

Fixed before the runs: the claim is confirmed if all five parts hold, and partly confirmed if two
to four do. (1) The standard deviation over initial weights of the training error at the inversion
is at most 0.3 points. (2) The mean Jaccard index of the stragglers of two networks is at least 2/3:
equal sets would share four fifths of their members. (3) The maximum of z, averaged over the draws,
is within 25 % of the mean epoch of the inversion. (4) More than half of the networks have no
inversion without their stragglers. (5) The test error is higher without the stragglers, than with
all images and than without as many random ones: both intervals are above 0.
"""
SAMPLES = 8192
MAIN = {"optimizer": "SGD", "learning_rate": 0.1, "epochs": 400, "networks": 12, "again": 4}
SMALL = {"networks": 4, "again": 0}
OTHERS = [
    {"optimizer": "SGD", "learning_rate": 0.05, "epochs": 600, **SMALL},
    {"optimizer": "SGD", "learning_rate": 0.2, "epochs": 300, **SMALL},
    {"optimizer": "SGD with momentum", "learning_rate": 0.02, "epochs": 300, **SMALL},
    {"optimizer": "Adam", "learning_rate": 0.001, "epochs": 300, **SMALL},
]
OTHER_DRAWS = 4
# What counts as a success, as in the protocol.
LARGEST_SD = 0.003
SMALLEST_JACCARD = 2 / 3
NEAR = 0.25
MOST = 0.5
# The trainings of the same networks, and how the names of their results begin.
STRAGGLERS, RANDOM = "without_stragglers_", "without_random_"
TRAININGS = {
    "all images": "",
    "without as many random ones": RANDOM,
    "without their stragglers": STRAGGLERS,
}


def settings(scope: Scope) -> list[Settings]:
    """A run is a draw of the images. The first optimizer has more networks and draws."""
    found = []
    for data, plan in [*((FASHION_MNIST, plan) for plan in [MAIN, *OTHERS]), (MNIST, MAIN)]:
        seeds = scope.seeds if plan is MAIN else scope.seeds[: 1 if scope.quick else OTHER_DRAWS]
        if scope.quick:
            fewer = {"networks": 4, "again": 2} if plan is MAIN else {"networks": 3}
            plan = plan | {"epochs": plan["epochs"] * 3 // 5} | fewer
        if scope.sources.has(data):
            found += [{"data": data, "seed": seed, "samples": SAMPLES, **plan} for seed in seeds]
    return found


class Group:
    """The runs of one data set and one optimizer: several draws of the images."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.data, self.at = rows[0]["data"], rows[0]["at"]
        self.optimizer = f"{rows[0]['optimizer']}, {rows[0]['learning_rate']:g}"
        self.networks = sum(row["networks"] for row in rows)
        self.epochs = [epoch for row in rows for epoch in row["inversion"] if epoch is not None]
        self.inversion = float(np.mean(self.epochs)) if self.epochs else None
        # A list for every draw that has an inversion.
        counts = [[count for count in row["stragglers"] if count is not None] for row in rows]
        self.stragglers = [of_draw for of_draw in counts if of_draw]
        self.errors = [np.array(of_draw) / rows[0]["samples"] for of_draw in self.stragglers]

    def spread(self) -> float:
        """The standard deviation of the training error at the inversion over initial weights."""
        variances = [errors.var(ddof=1) for errors in self.errors if len(errors) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else float("nan")

    def jaccard(self) -> float:
        """The mean Jaccard index of the stragglers of two networks of a draw."""
        values = [row["jaccard"] for row in self.rows if "jaccard" in row]
        return float(np.mean(values)) if values else float("nan")

    def chance(self) -> float:
        """The Jaccard index of random sets of the size of the stragglers."""
        share = float(np.concatenate(self.errors).mean())
        return share / (2 - share)

    def curves(self, name: str) -> np.ndarray:
        """A curve of every draw that has it, ``[draws, epochs]``."""
        return np.array([row[name] for row in self.rows if name in row], float)

    def peak(self, name: str) -> int:
        """The epoch at which a curve, averaged over the draws, is largest."""
        return self.at[int(np.nanargmax(np.nanmean(self.curves(name), 0)))]

    def again(self, name: str, without: str = "") -> list[list[float]]:
        """What the networks that were trained again show, a list for every draw.

        If ``without`` is empty, this is what the same networks show with all images.
        """
        rows = [row for row in self.rows if "trained_again" in row]
        if without:
            return [row[without + name] for row in rows]
        return [[row[name][i] for i in row["trained_again"]] for row in rows]

    def more_errors(self, without: str = "") -> Interval:
        """By how much the test error without the stragglers is higher than that of others."""
        first, second = (
            [float(np.mean(errors)) for errors in self.again("test_error", name)]
            for name in (without, STRAGGLERS)
        )
        return paired_difference(first, second)


def groups(rows: Sequence[Row]) -> list[Group]:
    """The runs of every data set and optimizer."""
    found: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        key = row["data"], row["optimizer"], row["learning_rate"]
        found.setdefault(key, []).append(row)
    return [Group(same) for same in found.values()]


def report(rows: list[Row]) -> Report:
    """The five parts of the claim on every data set, and the tables."""
    found = groups(rows)
    mains = [group for group in found if group.rows[0]["again"]]
    several = len(mains) > 1
    parts = {group.data: parts_of(group) for group in mains}
    held = sum(all(holds for holds, _ in same) for same in zip(*parts.values(), strict=True))
    texts: dict[bool, list[str]] = {False: [], True: []}
    for data, its_parts in parts.items():
        for holds, text in its_parts:
            texts[holds].append(f"{text} ({data})" if several else text)
    verdict = [f"Against the claim, {'; '.join(texts[False])}."] if texts[False] else []
    verdict += [f"As claimed, {'; '.join(texts[True])}."] if texts[True] else []
    tested = [group for group in mains if group.again("inversion")]
    return Report(
        outcome="confirmed" if held == 5 else "partly confirmed" if held > 1 else "not confirmed",
        verdict=" ".join(verdict),
        tables=[inversion_table(found), *map(again_table, tested)],
        notes=[*map(note, tested)]
        + ([] if several else [f"{MNIST} was not run: `--mnist` names its files."]),
    )


def parts_of(group: Group) -> list[tuple[bool, str]]:
    """The five parts of the claim: whether each holds, and in which words."""
    if len(group.epochs) < 2 or not group.again("inversion"):
        nothing = f"{len(group.epochs)} of {group.networks} networks have an inversion"
        return [(False, nothing), *[(False, "this leaves a part untested")] * 4]
    spread, jaccard, peak = group.spread(), group.jaccard(), group.peak("stability")
    error = np.concatenate(group.errors).mean()
    inversions = np.concatenate(group.again("inversion", STRAGGLERS)).tolist()
    none = inversions.count(None)
    than_all, than_random = group.more_errors(), group.more_errors(RANDOM)
    return [
        (
            spread <= LARGEST_SD,
            f"the training error at the inversion is {100 * error:.2f} % with a standard deviation "
            f"of {100 * spread:.2f} points over initial weights",
        ),
        (
            jaccard >= SMALLEST_JACCARD,
            f"the stragglers of two networks have a mean Jaccard index of {jaccard:.2f} (chance: "
            f"{group.chance():.2f})",
        ),
        (
            abs(peak / group.inversion - 1) <= NEAR,
            f"z is largest at epoch {peak}, while the mean inversion is at {group.inversion:.0f}",
        ),
        (
            none > MOST * len(inversions),
            f"without their stragglers {none} of {len(inversions)} networks have no inversion",
        ),
        (
            than_all.low > 0 and than_random.low > 0,
            f"leaving out the stragglers adds {than_all.text(2, 100)} points to the test error, "
            f"{than_random.text(2, 100)} more than leaving out as many random images",
        ),
    ]


def inversion_table(found: Sequence[Group]) -> Table:
    """The inversion point and the stragglers with every optimizer."""
    rows = []
    for group in found:
        cells = [group.data, group.optimizer, f"{len(group.epochs)} of {group.networks}"]
        if group.epochs:
            cells += [
                mean_sd(group.epochs, 0),
                mean_sd([errors.mean() for errors in group.errors], 2, 100),
                f"{100 * group.spread():.2f}",
                mean_sd(np.concatenate(group.stragglers), 0),
                f"{group.jaccard():.2f}",
                f"{group.chance():.3f}",
            ]
        rows.append(cells + ["-"] * (9 - len(cells)))
    return Table(
        "The inversion point with every optimizer and learning rate: epoch and stragglers, mean ± "
        "standard deviation over networks; training error in percent, mean ± standard deviation "
        "over draws; its standard deviation over initial weights, in points; mean Jaccard index of "
        "the stragglers of two networks on the same images, and that of random sets of this size.",
        [
            "data",
            "optimizer",
            "inverted",
            "epoch",
            "error",
            "its sd",
            "stragglers",
            "Jaccard",
            "random",
        ],
        rows,
    )


def again_table(group: Group) -> Table:
    """The networks that were trained again, next to their first training."""
    rows = []
    for name, without in TRAININGS.items():
        inversions = np.concatenate(group.again("inversion", without)).tolist()
        rising = np.concatenate(group.again("rising", without)).mean()
        errors = [float(np.mean(of_draw)) for of_draw in group.again("test_error", without)]
        inverted = f"{len(inversions) - inversions.count(None)} of {len(inversions)}"
        rows.append([name, inverted, f"{100 * rising:.0f}", mean_sd(errors, 2, 100)])
    return Table(
        f"{group.data}, the networks that were trained again: how many have an inversion, the "
        f"percentage of epochs from {FIRST_EPOCH} on at which the radius does not fall, and the "
        "test error in percent after the last epoch, mean ± standard deviation over draws.",
        ["training images", "inverted", "epochs", "test error"],
        rows,
    )


def note(group: Group) -> str:
    """What the tables do not show: the curves over pairs, and the error at a fixed epoch."""
    near = min(range(len(group.at)), key=lambda i: abs(group.at[i] - group.inversion))
    z, overlap = (np.nanmean(group.curves(name), 0) for name in ("stability", "overlap"))
    fixed = 100 * np.sqrt(np.mean(group.curves("error_sd")[:, near] ** 2))
    return (
        f"{group.data}, {group.optimizer}: z is {z[near]:.0f} at epoch {group.at[near]}, next to "
        f"the mean inversion, and {np.nanmax(z):.0f} at its maximum. The Jaccard index of "
        f"misclassified images at equal epochs is {overlap[near]:.2f} there, and largest at epoch "
        f"{group.peak('overlap')} with {overlap.max():.2f}. If all networks stop at epoch "
        f"{group.at[near]}, the standard deviation of their training error over initial weights is "
        f"{fixed:.2f} points."
    )


def draw(rows: list[Row], figure: "Figure") -> None:
    """The radius with and without stragglers, z, and the error at the inversion by optimizer."""
    every = groups(rows)
    found = [group for group in every if group.data == every[0].data]
    figure.set_size_inches(11, 3.6)
    figure.suptitle(f"{found[0].data}: is the label even?", fontsize=11)
    radius, stability, errors = figure.subplots(1, 3)
    for (label, without), style in zip(TRAININGS.items(), ("-", ":", "--"), strict=True):
        if len(curves := found[0].curves(f"{without}radius")):
            radius.plot(found[0].at, curves.mean(0), style, label=label)
    z = found[0].curves("stability")
    mean, deviation = np.nanmean(z, 0), np.nanstd(z, 0)
    stability.fill_between(found[0].at, mean - deviation, mean + deviation, alpha=0.2)
    stability.plot(found[0].at, mean, label="mean and deviation over draws")
    for axes, name in ((radius, "radius of the even class"), (stability, "z")):
        mark_inversion(found[0], axes)
        axes.set(xlabel="epoch", ylabel=name, xscale="log", ylim=(0, None))
        axes.legend(fontsize=8, loc="lower right" if axes is stability else "lower left")
    for index, group in enumerate(found):
        values = 100 * np.concatenate([*group.errors, []])
        errors.plot(values, [index] * len(values), "o", alpha=0.3, markeredgewidth=0)
    errors.set(
        xlabel="training error at the inversion (%), a point a network",
        yticks=range(len(found)),
        yticklabels=[group.optimizer.replace("with", "+") for group in found],
        ylim=(len(found) - 0.5, -0.5),
        xlim=(0, None),
    )


def mark_inversion(group: Group, axes: "Axes") -> None:
    """Mark the mean epoch of the inversion, and what counts as near to it."""
    if group.inversion is not None:
        low, high = group.inversion * (1 - NEAR), group.inversion * (1 + NEAR)
        axes.axvspan(low, high, color="0.5", alpha=0.15, linewidth=0)
        axes.axvline(group.inversion, color="0.4", linewidth=1, label="mean inversion, ± 25 %")


CLAIM = Claim(
    name="inversion",
    title="The inversion point and its stragglers",
    statement=STATEMENT,
    source="Ciceri et al., 2024",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
    seeds=10,
    quick_seeds=2,
)

if __name__ == "__main__":
    sys.exit(main(CLAIM))
