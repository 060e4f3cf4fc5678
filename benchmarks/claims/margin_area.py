"""Does the area under the curve of normalised margins order networks by their test error?

python benchmarks/claims/margin_area.py            # all networks: tables, a result file, a figure
python benchmarks/claims/margin_area.py --quick    # few, small trainings; writes nothing

A seed is one combination of initial scale, batch size and learning rate. With it every architecture
is trained once for each share of random labels: eight seeds are the complete design.
"""

import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.correlation import correlation_interval, interval_within, kendall, spearman
from harness.data import FASHION_MNIST
from harness.statistics import Interval, mean_sd
from trainings.margin_area import BARTLETT, BATCH_NORM, NORMS, PERCEPTRON, UNNORMALISED, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARCHITECTURES = {BATCH_NORM: "convolutions with batch norm", PERCEPTRON: "perceptrons"}
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SCALES = (1.0, 3.0)
BATCH_SIZES = {BATCH_NORM: (64, 256), PERCEPTRON: (32, 128)}
LEARNING_RATES = {BATCH_NORM: (0.02, 0.1), PERCEPTRON: (0.007, 0.02)}
THRESHOLD = 0.8
# A statistic: the norm that divides the margins, and what is taken of them.
Statistic = tuple[str, str]
FIXED: Statistic = ("frobenius fold", "rank")
FORMS = ("rank", "cdf")


def settings(scope: Scope) -> list[Settings]:
    """The networks of a scope. Eight seeds have all combinations of two by two by two values."""
    if not scope.sources.has(FASHION_MNIST):
        return []
    architectures = (PERCEPTRON,) if scope.quick else tuple(ARCHITECTURES)
    shares = SHARES[::2] if scope.quick else SHARES
    return [
        {
            "data": FASHION_MNIST,
            "architecture": architecture,
            "seed": seed,
            "share": share,
            "scale": SCALES[seed % 2],
            "batch_size": BATCH_SIZES[architecture][seed // 2 % 2],
            "learning_rate": LEARNING_RATES[architecture][seed // 4 % 2],
            "samples": 1000 if scope.quick else 2000,
            "epochs": 300,
            "loss": 0.01,
        }
        for architecture, seed, share in product(architectures, scope.seeds, shares)
    ]


def report(rows: list[Row]) -> Report:
    """What the networks say. Those that do not separate their samples are left out."""
    kept = separating(rows)
    if not kept:
        return Report("not confirmed", "No network was trained: Fashion-MNIST was not found.", [])
    left_out = sum(not row["separates"] for row in rows)
    notes = [f"{left_out} of {len(rows)} networks did not separate their samples.", *NOTES]
    tables = [by_statistic(name, networks) for name, networks in kept.items()]
    return Report(*judged(kept), [*tables, by_share(kept)], notes)


def separating(rows: list[Row]) -> dict[str, list[Row]]:
    """The networks of each architecture that separate their samples."""
    found: dict[str, list[Row]] = {name: [] for name in ARCHITECTURES}
    for row in rows:
        if row["separates"]:
            found[row["architecture"]].append(row)
    return {name: networks for name, networks in found.items() if networks}


def judged(kept: dict[str, list[Row]]) -> tuple[Any, str]:
    """The outcome and the verdict."""
    areas = {
        name: {
            one: float(spearman(*pairs(networks, one)))
            for one in filter(is_area, statistics(networks))
        }
        for name, networks in kept.items()
    }
    reached = {
        name: [one for one, value in found.items() if value >= THRESHOLD]
        for name, found in areas.items()
    }
    failed = [ARCHITECTURES[name] for name in areas if FIXED not in reached[name]]
    outcome = "partly confirmed" if any(reached.values()) else "not confirmed"
    start = f"falls short of {THRESHOLD} for the {' and the '.join(failed)}"
    if not failed:
        outcome, start = "confirmed", "orders the networks by test error"
    fixed = {name: f"{found[FIXED]:.2f}" for name, found in areas.items()}
    parts = [
        f"The area that was fixed before the runs {start}: its Spearman correlation with the test "
        f"accuracy is {listed(fixed)}."
    ]
    for name, found in areas.items():
        best = max(found, key=found.__getitem__)
        parts.append(
            f"For the {ARCHITECTURES[name]}, {len(reached[name])} of {len(found)} readings of the "
            f"area reach {THRESHOLD}; the best is {label(best, name)}, with {found[best]:.2f}."
        )
    for same, group in (("share", "the same share of random labels"), ("seed", "the same seed")):
        found = {name: within(networks, FIXED, same) for name, networks in kept.items()}
        texts = {
            name: one.text() + ("" if one.low > 0 else " (not clearly above 0)")
            for name, one in found.items()
        }
        parts.append(f"Among networks with {group} it is {listed(texts)}.")
    return outcome, " ".join(parts)


def listed(texts: dict[str, str]) -> str:
    """A text for each architecture."""
    return " and ".join(f"{text} for the {ARCHITECTURES[name]}" for name, text in texts.items())


def statistics(networks: list[Row]) -> list[Statistic]:
    """Every reading of the area, then what it is compared with."""
    names = [name for name in networks[0]["statistics"] if name.split()[0] in NORMS]
    others = [(FIXED[0], what) for what in ("tenth", "smallest", "norm")]
    return [*product(names, FORMS), *others, (UNNORMALISED, "rank"), (BARTLETT, "rank")]


def is_area(statistic: Statistic) -> bool:
    """Whether a statistic is a reading of the area."""
    return statistic[0].split()[0] in NORMS and statistic[1] in FORMS


def label(statistic: Statistic, architecture: str) -> str:
    """A statistic in words."""
    normaliser, what = statistic
    if normaliser == UNNORMALISED:
        return "mean margin, not normalised"
    if normaliser == BARTLETT:
        return "mean margin of Bartlett et al. (2017)"
    norm, reading = normaliser.split()
    words = f"{norm.capitalize()}, {reading}" if architecture == BATCH_NORM else norm.capitalize()
    return {
        "rank": f"{words}, rank form" + (" (fixed)" if statistic == FIXED else ""),
        "cdf": f"{words}, CDF form",
        "tenth": f"10th percentile of the margins ({words})",
        "smallest": f"smallest margin ({words})",
        "norm": f"product of the norms alone ({words})",
    }[what]


def pairs(networks: list[Row], statistic: Statistic) -> tuple[np.ndarray, np.ndarray]:
    """The statistic and the test accuracy of every network. A product of norms is negated."""
    normaliser, what = statistic
    values = np.array([row["statistics"][normaliser][what] for row in networks])
    accuracy = 1 - np.array([row["test_error"] for row in networks])
    return -values if what == "norm" else values, accuracy


def within(networks: list[Row], statistic: Statistic, same: str) -> Interval:
    """Spearman's correlation among networks that have a setting in common."""
    return interval_within(*pairs(networks, statistic), [row[same] for row in networks])


def by_statistic(name: str, networks: list[Row]) -> Table:
    """The correlations of every statistic of an architecture."""
    rows = []
    for statistic in statistics(networks):
        values = pairs(networks, statistic)
        intervals = (
            correlation_interval(spearman, *values),
            correlation_interval(kendall, *values),
            within(networks, statistic, "share"),
            within(networks, statistic, "seed"),
        )
        rows.append([label(statistic, name), *(interval.text() for interval in intervals)])
    errors = [100 * row["test_error"] for row in networks]
    return Table(
        f"Rank correlation of each statistic with the test accuracy, over {len(networks)} "
        f"{ARCHITECTURES[name]} with test errors from {min(errors):.1f} % to {max(errors):.1f} %, "
        "with 95 % intervals of the bootstrap over networks.",
        ["statistic", "Spearman", "Kendall", "Spearman, same share", "Spearman, same seed"],
        rows,
    )


def by_share(kept: dict[str, list[Row]]) -> Table:
    """Test error and area of the networks of every share."""
    rows = []
    for name, share in product(kept, SHARES):
        if group := [row for row in kept[name] if row["share"] == share]:
            values, accuracy = pairs(group, FIXED)
            measured = mean_sd(100 * (1 - accuracy)), mean_sd(1000 * values)
            rows.append([ARCHITECTURES[name], f"{100 * share:.0f}", str(len(group)), *measured])
    return Table(
        "Test error and area (the fixed reading) after pre-training with each share of random "
        "labels: mean ± standard deviation.",
        ["architecture", "random labels in %", "networks", "test error in %", "1000 x area"],
        rows,
    )


def draw(rows: list[Row], figure: "Figure") -> None:
    """Test error against area, and the correlations of all statistics."""
    from matplotlib.ticker import LogLocator

    groups = separating(rows)
    figure.set_size_inches(10, 9)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    panels = above.subplots(1, len(groups), squeeze=False)[0]
    for axes, (name, networks) in zip(panels, groups.items(), strict=True):
        values, accuracy = pairs(networks, FIXED)
        shares = [100 * row["share"] for row in networks]
        points = axes.scatter(1000 * values, 100 * (1 - accuracy), c=shares, vmin=0, vmax=100)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set(
            title=ARCHITECTURES[name],
            xlabel="1000 x area (fixed reading)",
            ylabel="test error in %",
        )
    above.colorbar(points, ax=panels, label="random labels in pre-training, %")

    axes = below.subplots()
    longest = max(map(statistics, groups.values()), key=len)[::-1]
    for offset, (name, networks) in zip((0.15, -0.15), groups.items(), strict=False):
        known = [one for one in longest if one in statistics(networks)]
        places = np.array([longest.index(one) for one in known]) + offset
        found = [correlation_interval(spearman, *pairs(networks, one)) for one in known]
        value, low, high = np.array([(one.value, one.low, one.high) for one in found]).T
        lines = axes.hlines(places, low, high, color=f"C{len(axes.collections)}")
        axes.scatter(value, places, color=lines.get_color(), label=ARCHITECTURES[name])
    axes.grid(axis="x", alpha=0.4)
    axes.axvline(THRESHOLD, color="0.3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(longest)), [label(one, BATCH_NORM) for one in longest])
    axes.set(xlim=(-1.05, 1.05), xlabel="Spearman's correlation with the test accuracy")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


PROTOCOL = f"""
**Networks.** All networks of an architecture train on the same 2,000 samples of Fashion-MNIST. The
architectures are a perceptron with two hidden layers of 128 units, and two convolutions and a
hidden layer of 64 units with a batch norm after each. The layers have no biases. Each architecture
has 48 networks, one for every combination of

- the share of labels that are drawn anew for pre-training: 0, 20, 40, 60, 80 or 100 %;
- the factor of the initial weights: 1 or 3;
- the batch size: 64 or 256 with batch norm, 32 or 128 for the perceptron;
- the learning rate: 0.02 or 0.1 with batch norm, 0.007 or 0.02 for the perceptron.

The training goes on from the pre-trained weights with the right labels. With a share of 0 there is
no pre-training. The optimizer is SGD with Nesterov momentum 0.9, without weight decay, at a
constant learning rate. The six networks that differ only in the share have the same seed.

**Stop.** Pre-training and training stop after the first epoch at which every sample is right and
the mean cross-entropy is at most 0.01, or after 300 epochs. A network that does not reach this on
the right labels is left out.

**Statistics.** How the authors integrate the area is not known to us, so there are two forms of it.
Margins are those of the training samples in evaluation mode. The rank form of the area is the mean
margin. The upper limit of the CDF form is the network's own largest margin. A positive correlation
says that a larger statistic, or a smaller product of norms, goes with a larger accuracy on the
10,000 test samples.

**Fixed before the runs.** The area is the rank form with the Frobenius norm and batch norms folded
into the layers before them: the defaults of marginops. The claim is confirmed if Spearman's
correlation is at least {THRESHOLD} for both architectures. It is partly confirmed if it is for one,
or if another reading of the area reaches {THRESHOLD} for one. About 30 trials with seed 100, other
training samples, and held-out ones in place of the test samples decided the ranges of the design
and the stop, so that networks separate their samples. No correlation was computed from them.

Training amplifies rounding errors: a complete run on another machine gave 0.62 for the
convolutions.
"""
NOTES = [
    "*Same share* ranks networks with the same share of random labels among themselves, and *same "
    "seed* ranks networks that differ only in the share. Each is one correlation over all groups.",
    "The best of many readings is large by selection. Only the one marked as fixed is a test. The "
    "intervals treat networks as independent, although six of them share a seed.",
    "With batch norm, a larger factor of the initial weights acts as a smaller learning rate.",
    "All networks stop near one cross-entropy, so areas differ mainly by the product of the norms.",
]

CLAIM = Claim(
    name="margin_area",
    title="Area under the margins and test error",
    statement="Among networks of one architecture that all separate the training data, the area "
    "under the curve of normalised margins orders the networks by their test error.",
    source="Banburski et al. 2021",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
    seeds=8,
    quick_seeds=8,
)

if __name__ == "__main__":
    sys.exit(main(CLAIM))
