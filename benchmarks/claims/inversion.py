"""Classes contract, then expand: is the turning point the same in every training?

The claim trains many small networks on the parity of the label. It looks at the epoch at which the
radius of a class stops falling, at the samples that are misclassified there, and at trainings
without these samples.

    python benchmarks/claims/inversion.py --quick
    python benchmarks/claims/inversion.py
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
    "inversion point the training error hardly depends on the seed, and nearly the same samples "
    "are misclassified in every training: the stragglers. Without the stragglers the radius "
    "shrinks all the time, and the test error is higher."
)
PROTOCOL = """
The network is that of the authors: one hidden layer of 20 tanh units, two logits, cross-entropy,
and one step an epoch with all samples. The target is whether the label is even. A run draws 8,192
training images, standardises every pixel over them, and trains 12 networks that differ in their
initial weights alone. There are ten such draws, 400 epochs with SGD, learning rate 0.1, without
momentum. `class_moments` gives the radius of the even class after every epoch, for hidden vectors
scaled to length 1. `InversionMonitor` finds the inversion point: the first epoch from 20 on at
which this radius does not fall. Stragglers are the training images that are misclassified then.
`straggler_stability` is z over all pairs of the networks of a draw, at equal epochs: how much more
often than by chance two networks misclassify the same images, in standard deviations.

In each draw, four of the networks are trained again from the same initial weights: once without
their own stragglers, once without as many random images. The test error is that of all test images
after the last epoch. Intervals of 95 % are bootstrapped over the draws.

The other optimizers train four networks on each of the first four draws, Adam and the momentum of
0.9 with learning rates and epochs for which draw 100 had its inversions between epoch 20 and the
end. Draw 100 fixed the numbers of epochs too; it is not among the reported ones.

Fixed before the runs: the claim is confirmed if all of these hold, partly confirmed if two to four
hold. (1) The standard deviation of the training error at the inversion, over initial weights, is
at most 0.3 percentage points. (2) The mean Jaccard index of the stragglers of two networks is at
least 2/3, which means four fifths of common members in sets of equal size. (3) The maximum of z,
averaged over the draws, is within 25 % of the mean epoch of the inversion. (4) More than half of
the networks have no inversion without their stragglers. (5) The test error without stragglers is
higher than with all images, and higher than without as many random ones; both intervals exclude 0.
"""
SAMPLES = 8192
# Optimizer, learning rate and epochs.
MAIN = ("SGD", 0.1, 400)
OTHERS = [
    ("SGD", 0.05, 600),
    ("SGD", 0.2, 300),
    ("SGD with momentum", 0.02, 300),
    ("Adam", 0.001, 300),
]
OTHER_DRAWS = 4
# What counts as a success, as in the protocol.
LARGEST_SD = 0.003
SMALLEST_JACCARD = 2 / 3
NEAR = 0.25
MOST = 0.5


class Part(NamedTuple):
    """A part of the claim: whether it held, and in which words."""

    held: bool
    text: str


class Group:
    """The runs of one data set and one optimizer, which have a draw of the samples each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.data, self.at = rows[0]["data"], rows[0]["at"]
        self.optimizer = f"{rows[0]['optimizer']}, {rows[0]['learning_rate']:g}"
        self.networks = sum(row["networks"] for row in rows)
        self.epochs = [epoch for row in rows for epoch in row["inversion"] if epoch is not None]
        self.stragglers = [
            count for row in rows for count in row["stragglers"] if count is not None
        ]
        # The training errors at the inversion, a list for every draw.
        self.errors = [
            [count / row["samples"] for count in row["stragglers"] if count is not None]
            for row in rows
        ]

    @property
    def spread(self) -> float:
        """The standard deviation of the training error at the inversion over initial weights."""
        variances = [np.var(errors, ddof=1) for errors in self.errors if len(errors) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else float("nan")

    @property
    def jaccard(self) -> float:
        """The Jaccard index of the stragglers of two networks, averaged over pairs and draws."""
        means = [row["jaccard"][0] for row in self.rows if "jaccard" in row]
        return float(np.mean(means)) if means else float("nan")

    @property
    def chance(self) -> float:
        """The Jaccard index of random sets of the size of the stragglers."""
        share = float(np.mean(self.stragglers)) / self.rows[0]["samples"]
        return share / (2 - share)

    def curve(self, name: str) -> np.ndarray:
        """A curve of every draw that has it, ``[draws, epochs]``."""
        return np.array([row[name] for row in self.rows if name in row], float)

    def largest(self, name: str) -> tuple[int, float]:
        """The epoch at which a curve, averaged over the draws, is largest, and its value there."""
        mean = self.curve(name).mean(0)
        return self.at[int(mean.argmax())], float(mean.max())

    def again(self, name: str, prefix: str = "without_stragglers_") -> list[list[float]]:
        """What the networks that were trained again show, a list for every draw."""
        return [row[prefix + name] for row in self.rows if "again" in row]

    def with_all(self, name: str) -> list[list[float]]:
        """What the same networks show with all samples."""
        return [[row[name][i] for i in row["again"]] for row in self.rows if "again" in row]


def settings(scope: Scope) -> list[Settings]:
    """Runs of one draw of the samples each; the first optimizer has more networks and draws."""
    found = []
    for data in (FASHION_MNIST, MNIST):
        if not scope.sources.has(data):
            continue
        for optimizer, rate, epochs in [MAIN, *(OTHERS if data == FASHION_MNIST else [])]:
            is_main = (optimizer, rate, epochs) == MAIN
            networks, again, draws = (12, 4, None) if is_main else (4, 0, OTHER_DRAWS)
            if scope.quick:
                networks, again, epochs = (5, 2, 240) if is_main else (2, 0, epochs * 3 // 5)
                draws = None if is_main else 1
            found += [
                {
                    "data": data,
                    "seed": seed,
                    "samples": SAMPLES,
                    "networks": networks,
                    "optimizer": optimizer,
                    "learning_rate": rate,
                    "epochs": epochs,
                    "again": again,
                }
                for seed in scope.seeds[:draws]
            ]
    return found


def groups(rows: Sequence[Row]) -> list[list[Group]]:
    """The groups of every data set, that of the first optimizer first."""
    found: dict[str, dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        of_data = found.setdefault(row["data"], {})
        of_data.setdefault((row["optimizer"], row["learning_rate"]), []).append(row)
    return [list(map(Group, of_data.values())) for of_data in found.values()]


def report(rows: list[Row]) -> Report:
    """The five parts of the claim on every data set."""
    found = groups(rows)
    several = len(found) > 1
    on_data = {of_data[0].data: parts(of_data[0]) for of_data in found}
    held = sum(all(part.held for part in same) for same in zip(*on_data.values(), strict=True))
    texts: dict[bool, list[str]] = {False: [], True: []}
    for data, its_parts in on_data.items():
        for part in its_parts:
            texts[part.held].append(f"{part.text} ({data})" if several else part.text)
    against = f"Against the claim, {'; '.join(texts[False])}. " if texts[False] else ""
    agreeing = f"As claimed, {'; '.join(texts[True])}." if texts[True] else ""
    return Report(
        outcome=("confirmed" if held == 5 else "partly confirmed" if held > 1 else "not confirmed"),
        verdict=(against + agreeing).strip(),
        tables=[
            inversion_table([group for of_data in found for group in of_data]),
            *(again_table(of_data[0]) for of_data in found if of_data[0].again("inversion")),
        ],
        notes=[note for of_data in found for note in notes(of_data[0], several)]
        + ([] if several else [f"{MNIST} was not run: `--mnist` names its files."]),
    )


def parts(group: Group) -> list[Part]:
    """The five parts of the claim for one data set."""
    if len(group.epochs) < 2 or not group.again("inversion"):
        text = f"{len(group.epochs)} of {group.networks} networks have an inversion"
        return [Part(False, text), *[Part(False, "the rest could not be tested")] * 4]
    spread, jaccard = group.spread, group.jaccard
    peak, inversion = group.largest("stability")[0], float(np.mean(group.epochs))
    without = [epoch for epochs in group.again("inversion") for epoch in epochs]
    quiet = without.count(None)
    errors = group.again("test_error")
    than_all = difference(group.with_all("test_error"), errors)
    than_random = difference(group.again("test_error", "without_random_"), errors)
    percentages = [100 * error for errors in group.errors for error in errors]
    return [
        Part(
            spread <= LARGEST_SD,
            f"the training error at the inversion is {np.mean(percentages):.2f} % and has a "
            f"standard deviation of {100 * spread:.2f} points over initial weights",
        ),
        Part(
            jaccard >= SMALLEST_JACCARD,
            f"the stragglers of two networks have a mean Jaccard index of {jaccard:.2f}, where "
            f"chance gives {group.chance:.2f}",
        ),
        Part(
            abs(peak / inversion - 1) <= NEAR,
            f"z is largest at epoch {peak}, and the mean inversion is at epoch {inversion:.0f}",
        ),
        Part(
            quiet > MOST * len(without),
            f"{quiet} of {len(without)} networks have no inversion without their stragglers",
        ),
        Part(
            than_all.low > 0 and than_random.low > 0,
            "the test error without stragglers is higher than with all images by "
            f"{than_all.text(2, 100)} points, and than without as many random images by "
            f"{than_random.text(2, 100)} points",
        ),
    ]


def difference(first: list[list[float]], second: list[list[float]]) -> Interval:
    """``second - first``, averaged over the networks of a draw, with its interval over draws."""
    return paired_difference([np.mean(values) for values in first], list(map(np.mean, second)))


def inversion_table(found: Sequence[Group]) -> Table:
    """The inversion point and the stragglers with every optimizer."""
    rows = []
    for group in found:
        cells = [group.data, group.optimizer, f"{len(group.epochs)} of {group.networks}"]
        if len(group.epochs) > 1:
            means = [np.mean(errors) for errors in group.errors if errors]
            cells += [
                mean_sd(group.epochs, 0),
                mean_sd(means, 2, 100),
                f"{100 * group.spread:.2f}",
                mean_sd(group.stragglers, 0),
                f"{group.jaccard:.2f}",
                f"{group.chance:.2f}",
            ]
        rows.append(cells + ["-"] * (9 - len(cells)))
    return Table(
        "The inversion point. Epoch and stragglers: mean ± standard deviation over networks. "
        "Training error at the inversion in percent: mean ± standard deviation over draws of the "
        "images, then the standard deviation over initial weights. Jaccard index of the stragglers "
        "of two networks on the same images, and that of random sets of their size.",
        [
            "data",
            "optimizer, learning rate",
            "with inversion",
            "epoch",
            "training error",
            "over weights",
            "stragglers",
            "Jaccard",
            "by chance",
        ],
        rows,
    )


def again_table(group: Group) -> Table:
    """The networks that were trained again."""
    trained = {
        "all": group.with_all,
        "without stragglers": group.again,
        "without as many random ones": lambda name: group.again(name, "without_random_"),
    }
    rows = []
    for name, values in trained.items():
        inversions = [epoch for epochs in values("inversion") for epoch in epochs]
        errors = values("test_error")
        by_all = difference(group.with_all("test_error"), errors)
        rows.append(
            [
                name,
                f"{len(inversions) - inversions.count(None)} of {len(inversions)}",
                f"{100 * np.mean([share for shares in values('rising') for share in shares]):.0f}",
                mean_sd([np.mean(of_draw) for of_draw in errors], 2, 100),
                "" if name == "all" else by_all.text(2, 100),
            ]
        )
    return Table(
        f"{group.data}: the same networks trained with fewer images. Epochs: the percentage of "
        f"those from {FIRST_EPOCH} on at which the radius does not fall. Test error in percent "
        "after the last epoch: mean ± standard deviation over draws, and the difference with its "
        "95 % interval.",
        ["training images", "with inversion", "epochs", "test error", "difference"],
        rows,
    )


def notes(group: Group, several: bool) -> list[str]:
    """What the tables do not show: where z and the overlap are largest, and a fixed epoch."""
    stability, overlap = group.largest("stability"), group.largest("overlap")
    if not group.epochs:
        return []
    near = min(range(len(group.at)), key=lambda i: abs(group.at[i] - np.mean(group.epochs)))
    fixed = float(np.sqrt(np.mean(group.curve("error_sd")[:, near] ** 2)))
    return [
        (f"{group.data}: " if several else "")
        + f"z is {group.curve('stability').mean(0)[near]:.0f} at epoch {group.at[near]}, next to the "
        f"mean inversion, and at most {stability[1]:.0f}, at epoch {stability[0]}; the maximum is at "
        f"epochs {peaks(group)} in 95 % of bootstrap samples of the draws. The mean Jaccard index "
        f"of misclassified images at equal epochs is {group.curve('overlap').mean(0)[near]:.2f} at "
        f"epoch {group.at[near]}, and at most {overlap[1]:.2f}, at epoch {overlap[0]}. The standard "
        f"deviation of the training error over initial weights is {100 * fixed:.2f} points at epoch "
        f"{group.at[near]} for all networks alike, so a fixed epoch is no worse in this respect."
    ]


def peaks(group: Group) -> str:
    """Between which epochs z of resampled draws is largest, in 95 % of the resamples."""
    curves = group.curve("stability")
    drawn = np.random.default_rng(0).integers(len(curves), size=(999, len(curves)))
    epochs = np.array(group.at)[curves[drawn].mean(1).argmax(1)]
    return "{:.0f} to {:.0f}".format(*np.quantile(epochs, [0.025, 0.975], method="nearest"))


def draw(rows: list[Row], figure: "Figure") -> None:
    """The radius with and without stragglers, z, and the error at the inversion by optimizer."""
    found = groups(rows)[0]
    main_group = found[0]
    figure.set_size_inches(11, 3.6)
    axes = figure.subplots(1, 3)
    figure.suptitle(f"{main_group.data}, parity of the label", fontsize=11)
    draw_radius(main_group, axes[0])
    draw_stability(main_group, axes[1])
    for index, group in enumerate(found):
        errors = [100 * error for of_draw in group.errors for error in of_draw]
        axes[2].plot(errors, [index] * len(errors), "o", alpha=0.3, markeredgewidth=0)
    axes[2].set(
        xlabel="training error at the inversion (%)",
        yticks=range(len(found)),
        yticklabels=[group.optimizer.replace(" with momentum", " + momentum") for group in found],
        ylim=(len(found) - 0.5, -0.5),
        title="a point per network",
    )
    axes[2].set_xlim(left=0)


def draw_radius(group: Group, axes: "Axes") -> None:
    """The radius of class 0 of the networks, averaged over the draws."""
    curves = {
        "all images": "radius",
        "without as many random ones": "without_random_radius",
        "without stragglers": "without_stragglers_radius",
    }
    for (label, name), style in zip(curves.items(), ("-", ":", "--"), strict=True):
        curve = group.curve(name)
        if len(curve):
            axes.plot(group.at, curve.mean(0), style, label=label)
    mark_inversion(group, axes)
    axes.set(xlabel="epoch", ylabel="radius of the even class", xscale="log", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower left")


def draw_stability(group: Group, axes: "Axes") -> None:
    """z with its standard deviation over the draws."""
    curve = group.curve("stability")
    mean, deviation = curve.mean(0), curve.std(0)
    axes.fill_between(group.at, mean - deviation, mean + deviation, alpha=0.2, linewidth=0)
    axes.plot(group.at, mean, label="z: mean and standard deviation")
    mark_inversion(group, axes)
    axes.set(xlabel="epoch", ylabel="z of misclassified images", xscale="log", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower right")


def mark_inversion(group: Group, axes: "Axes") -> None:
    """A line at the mean epoch of the inversion, and the range that counts as near to it."""
    if group.epochs:
        epoch = float(np.mean(group.epochs))
        axes.axvline(epoch, color="0.4", linewidth=1, label=f"inversion, ± {100 * NEAR:.0f} %")
        axes.axvspan(epoch * (1 - NEAR), epoch * (1 + NEAR), color="0.5", alpha=0.15, linewidth=0)


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
