"""Classes contract, then expand: is the turning point the same in every training?

Small networks learn the parity of the label. The claim looks at the epoch at which the radius of a
class stops falling, at the images that are misclassified there, and at trainings without these.

    python benchmarks/claims/inversion.py --quick
    python benchmarks/claims/inversion.py
"""

import sys
from typing import TYPE_CHECKING

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.data import FASHION_MNIST, MNIST
from harness.statistics import Interval, mean_sd, paired_difference
from trainings.inversion import FIRST_EPOCH, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATEMENT = (
    "In training, the radius of a class in the hidden layer shrinks, then grows. At this inversion "
    "the training error hardly depends on the seed, nearly the same samples are misclassified in "
    "all runs (the stragglers), and the runs agree on them most. Without the stragglers the radius "
    "shrinks all the time, and the test error is higher."
)
PROTOCOL = """
The network is the authors': one hidden layer of 20 tanh units, two logits, cross-entropy, one step
an epoch with all images. The target is whether the label is even. Each of ten runs draws 8,192
training images, standardises every pixel over them, and trains 12 networks that differ in their
initial weights alone: SGD without momentum, learning rate 0.1, 400 epochs. `class_moments` gives
the radius of the even class, for hidden vectors of length 1. `InversionMonitor` finds the
inversion: the first epoch from 20 on at which the radius does not fall. Images that are
misclassified then are stragglers. `straggler_stability` gives z, at epochs that grow by 15 %: how
much more often than by chance two networks of a draw misclassify the same images, in standard
deviations over all pairs.

Four networks of each draw are trained again from the same initial weights: without their own
stragglers, and without as many random images. All test images are classified after the last epoch.
Intervals of 95 % are bootstrapped over the draws. Other optimizers (momentum: 0.9) train four
networks on four draws, with learning rates and epochs that gave inversions on an eleventh draw.

Fixed before the runs: the claim is confirmed if all five parts hold, and partly confirmed if two
to four do. (1) The standard deviation over initial weights of the training error at the inversion
is at most 0.3 points. (2) The mean Jaccard index of the stragglers of two networks is at least 2/3:
equal sets would share four fifths of their members. (3) The maximum of z, averaged over the draws,
is within 25 % of the mean epoch of the inversion. (4) More than half of the networks have no
inversion without their stragglers. (5) The test error is higher without the stragglers, than with
all images and than without as many random ones: both intervals are above 0.
"""
SAMPLES, OTHER_DRAWS = 8192, 4
MAIN = {"optimizer": "SGD", "learning_rate": 0.1, "epochs": 400, "networks": 12, "again": 4}
OTHERS = [
    MAIN | {"learning_rate": 0.05, "epochs": 600, "networks": 4, "again": 0},
    MAIN | {"learning_rate": 0.2, "epochs": 300, "networks": 4, "again": 0},
]
OTHERS += [
    OTHERS[1] | {"optimizer": "SGD with momentum", "learning_rate": 0.02},
    OTHERS[1] | {"optimizer": "Adam", "learning_rate": 0.001},
]
# What counts as a success, as in the protocol.
LARGEST_SD, SMALLEST_JACCARD, NEAR, MOST = 0.003, 2 / 3, 0.25, 0.5
# The trainings of the same networks, and how the names of their results begin.
STRAGGLERS, RANDOM = "without_stragglers_", "without_random_"
TRAININGS = {"all images": "", "no stragglers": STRAGGLERS, "as many random ones left out": RANDOM}


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

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.data, self.at = rows[0]["data"], rows[0]["at"]
        self.optimizer = f"{rows[0]['optimizer']}, {rows[0]['learning_rate']:g}"
        self.networks = sum(row["networks"] for row in rows)
        self.epochs = [epoch for row in rows for epoch in row["inversion"] if epoch is not None]
        self.inversion = float(np.mean(self.epochs)) if self.epochs else None
        counts = [[count for count in row["stragglers"] if count is not None] for row in rows]
        self.stragglers = [of_draw for of_draw in counts if of_draw]
        self.errors = [np.array(of_draw) / rows[0]["samples"] for of_draw in self.stragglers]

    def spread(self) -> float:
        """The standard deviation of the training error at the inversion over initial weights."""
        variances = [errors.var(ddof=1) for errors in self.errors if len(errors) > 1]
        return float(np.sqrt(np.mean(variances or [np.nan])))

    def jaccard(self) -> float:
        """The mean Jaccard index of the stragglers of two networks of a draw."""
        return float(np.mean([row["jaccard"] for row in self.rows if "jaccard" in row] or [np.nan]))

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
        """What the networks that were trained again show; without "", in their first training."""
        rows = [row for row in self.rows if "trained_again" in row]
        if without:
            return [row[without + name] for row in rows]
        return [[row[name][i] for i in row["trained_again"]] for row in rows]

    def more_errors(self, without: str = "") -> Interval:
        """By how much the test error without the stragglers is higher than that of others."""
        pair = [self.again("test_error", name) for name in (without, STRAGGLERS)]
        return paired_difference(*([float(np.mean(of_draw)) for of_draw in one] for one in pair))


def groups(rows: list[Row]) -> list[Group]:
    """The runs of every data set and optimizer."""
    same: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        same.setdefault((row["data"], row["optimizer"], row["learning_rate"]), []).append(row)
    return list(map(Group, same.values()))


def report(rows: list[Row]) -> Report:
    """The five parts of the claim on every data set, and the tables."""
    found = groups(rows)
    mains = [group for group in found if group.rows[0]["again"]]
    parts = [parts_of(group) for group in mains]
    held = sum(all(holds for holds, _ in same) for same in zip(*parts, strict=True))
    verdict = ""
    for wanted, words in ((False, "Against the claim"), (True, "As claimed")):
        texts = [
            f"{text} ({group.data})" if len(mains) > 1 else text
            for group, of_data in zip(mains, parts, strict=True)
            for holds, text in dict.fromkeys(of_data)
            if holds == wanted
        ]
        verdict += f"{words}, {'; '.join(texts)}. " if texts else ""
    tables, notes = [], []
    for group in mains:
        same_data = [other for other in found if other.data == group.data]
        tables.append(inversion_table(same_data))
        if group.again("inversion"):
            tables.append(again_table(group))
            notes.append(note(group, same_data))
    if MNIST not in [group.data for group in mains]:
        notes.append(f"{MNIST} was not run: `--mnist` names its files.")
    outcome = "confirmed" if held == 5 else "partly confirmed" if held > 1 else "not confirmed"
    return Report(outcome, verdict.strip(), tables, notes)


def parts_of(group: Group) -> list[tuple[bool, str]]:
    """The five parts of the claim: whether each holds, and in which words."""
    if len(group.epochs) < 2 or not group.again("inversion"):
        return [(False, f"{len(group.epochs)} of {group.networks} networks have an inversion")] * 5
    spread, jaccard, peak = group.spread(), group.jaccard(), group.peak("stability")
    inversions = np.concatenate(group.again("inversion", STRAGGLERS)).tolist()
    error, none = np.concatenate(group.errors).mean(), inversions.count(None)
    draws = [Group([row]) for row in group.rows if "trained_again" in row]
    ratios = [one.peak("stability") / one.inversion for one in draws]
    than_all, than_random = group.more_errors(), group.more_errors(RANDOM)
    holds = [
        spread <= LARGEST_SD,
        jaccard >= SMALLEST_JACCARD,
        abs(peak / group.inversion - 1) <= NEAR,
        none > MOST * len(inversions),
        than_all.low > 0 and than_random.low > 0,
    ]
    texts = [
        f"the training error at the inversion is {100 * error:.2f} % with a standard deviation of "
        f"{100 * spread:.2f} points over initial weights",
        f"the stragglers of two networks have a mean Jaccard index of {jaccard:.2f} (random sets: "
        f"{group.chance():.3f})",
        f"runs agree most at epoch {peak}, where z is largest, and the mean inversion is at epoch "
        f"{group.inversion:.0f} (in single draws z is largest at {min(ratios):.1f} to "
        f"{max(ratios):.1f} times the epoch of the inversion)",
        f"without their stragglers {none} of {len(inversions)} networks have no inversion",
        f"leaving out the stragglers adds {than_all.text(2, 100)} points to the test error, "
        f"{than_random.text(2, 100)} more than leaving out as many random images",
    ]
    return list(zip(holds, texts, strict=True))


def inversion_table(found: list[Group]) -> Table:
    """The inversion point and the stragglers with every optimizer, for one data set."""
    rows = []
    for group in found:
        cells = [group.optimizer, f"{len(group.epochs)} of {group.networks}"]
        if group.epochs:
            cells += [
                mean_sd(group.epochs, 0),
                mean_sd([errors.mean() for errors in group.errors], 2, 100),
                f"{100 * group.spread():.2f}",
                mean_sd(np.concatenate(group.stragglers), 0),
                f"{group.jaccard():.2f} ({group.chance():.3f})",
            ]
        rows.append(cells + ["-"] * (7 - len(cells)))
    return Table(
        f"{found[0].data}, the networks with an inversion, its epoch, the training error there in "
        "percent, and the stragglers. Epoch and stragglers: mean ± standard deviation over "
        "networks. Error: the same over draws, then its standard deviation over initial weights. "
        "Jaccard index: the mean over pairs of networks of a draw (that of random sets).",
        ["optimizer", "inverted", "epoch", "error", "deviation", "stragglers", "Jaccard (random)"],
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
        ["training images", "inverted", "epochs (%)", "test error (%)"],
        rows,
    )


def note(group: Group, same_data: list[Group]) -> str:
    """What the tables do not show: the curves over pairs, and the error at a fixed epoch."""
    near = min(range(len(group.at)), key=lambda i: abs(group.at[i] - group.inversion))
    z, overlap = (np.nanmean(group.curves(name), 0) for name in ("stability", "overlap"))
    fixed = 100 * np.sqrt(np.mean(group.curves("error_sd")[:, near] ** 2))
    errors = [100 * np.concatenate(one.errors).mean() for one in same_data if one.errors]
    return (
        f"{group.data}, {group.optimizer}: z is {z[near]:.0f} near the mean inversion, at epoch "
        f"{group.at[near]}, and at most {np.nanmax(z):.0f}. The Jaccard "
        f"index of images misclassified at equal epochs is {overlap[near]:.2f} there, and at most "
        f"{overlap.max():.2f}, at epoch {group.peak('overlap')}. The training error at the fixed "
        f"epoch {group.at[near]} deviates by {fixed:.2f} points over initial weights. At the "
        f"inversion it is {min(errors):.1f} to {max(errors):.1f} % between optimizers."
    )


def draw(rows: list[Row], figure: "Figure") -> None:
    """The radius with and without stragglers, z, and the error at the inversion by optimizer."""
    found = [group for group in groups(rows) if group.data == rows[0]["data"]]
    figure.set_size_inches(11, 3.6)
    figure.suptitle(f"{found[0].data}: networks that learn whether the label is even", fontsize=11)
    radius, stability, errors = figure.subplots(1, 3)
    for (label, without), style in zip(TRAININGS.items(), ("-", "--", ":"), strict=True):
        if len(curves := found[0].curves(f"{without}radius")):
            radius.plot(found[0].at, curves.mean(0), style, label=label)
    z = found[0].curves("stability")
    mean, deviation = np.nanmean(z, 0), np.nanstd(z, 0)
    stability.fill_between(found[0].at, mean - deviation, mean + deviation, alpha=0.2, linewidth=0)
    stability.plot(found[0].at, mean, label="mean ± deviation over draws")
    for axes, name in ((radius, "radius of the even class"), (stability, "z")):
        if (epoch := found[0].inversion) is not None:
            axes.axvspan(epoch * (1 - NEAR), epoch * (1 + NEAR), color="0.85", zorder=0)
            axes.axvline(epoch, color="0.4", linewidth=1, label=f"inversion ± {100 * NEAR:.0f} %")
        axes.set(xlabel="epoch", ylabel=name, xscale="log", ylim=(0, None))
        axes.legend(fontsize=8, loc="lower right" if axes is stability else "lower left")
    for index, group in enumerate(found):
        values = 100 * np.concatenate([*group.errors, []])
        errors.plot(values, [index] * len(values), "o", alpha=0.3, markeredgewidth=0)
    errors.set_yticks(range(len(found)), [group.optimizer.replace("with", "+") for group in found])
    errors.set(xlabel="training error at the inversion (%)", xlim=(0, None))
    errors.invert_yaxis()


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
)

if __name__ == "__main__":
    sys.exit(main(CLAIM))
