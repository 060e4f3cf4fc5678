"""Does one training find changed labels better than cleanlab with its folds, in less time?

python benchmarks/claims/label_issues.py            # tables, a result file, a figure, a sheet
python benchmarks/claims/label_issues.py --quick    # two kinds of noise, a fifth of the samples
"""

import importlib.metadata
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.data import FASHION_MNIST
from harness.statistics import Interval, mean_sd, paired_difference, paired_ratio
from label_issues_sheet import draw_sheet, looked_at
from trainings.label_issues import (
    CLEANLAB,
    LABEL_ISSUES,
    LOSS,
    SIMILAR,
    SYMMETRIC,
    THRESHOLD,
    TRAINED,
    run,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = 10
NOISES = ((SYMMETRIC, 0.05), (SYMMETRIC, 0.2), (SYMMETRIC, 0.4), (SIMILAR, 0.2))
# Noises of the methods that are not compared at all four, and of the quick runs.
TWO_NOISES = NOISES[1::2]
SAMPLES, FEW_SAMPLES = 60_000, 12_000
OTHER, OTHER_SHORT = "cleanlab, 5 folds", "cleanlab, 5 folds, short"
LONG = "label_issues, long"
LAST = "margin"
# Of each method the epochs and the learning rate, chosen with other seeds.
METHODS: dict[str, dict[str, Any]] = {
    LABEL_ISSUES: {"method": LABEL_ISSUES, "epochs": 4, "learning_rate": 0.03},
    LOSS: {"method": LOSS, "epochs": 4, "learning_rate": 0.1},
    THRESHOLD: {"method": THRESHOLD, "epochs": 4, "learning_rate": 0.03},
    OTHER: {"method": CLEANLAB, "folds": 5, "epochs": 12, "learning_rate": 0.03},
    OTHER_SHORT: {"method": CLEANLAB, "folds": 5, "epochs": 1, "learning_rate": 0.03},
    LONG: {"method": LABEL_ISSUES, "epochs": 40, "learning_rate": 0.03},
}
AT_TWO_NOISES = (THRESHOLD, OTHER_SHORT)
QUICK = (LABEL_ISSUES, LOSS, OTHER)
PROTOCOL = f"""
Symmetric noise changes each label of the 60,000 training samples of Fashion-MNIST with a given
probability to one of the nine other classes. Noise among similar classes changes labels of T-shirts
and shirts, of pullovers and coats, and of sneakers and ankle boots, with a probability of 20 %, to
the other class of the pair. So it changes 12 % of all labels.

All networks have one hidden layer of 256 units. They are trained in batches of 128 by stochastic
gradient descent with Nesterov momentum 0.9 and weight decay 5e-4. The learning rate rises over a
tenth of the steps and falls to 0 as a cosine. `label_issues` orders the samples of one training by
its default score. cleanlab gets the probabilities of each sample from a network that was trained on
the other four fifths, and orders by its default label quality; `find_label_issues` is its own rule.
It is not part of the extra `bench`: run `pip install cleanlab`. Its short form has one epoch for
each fold, so that it takes about the CPU time of `label_issues`. Threshold samples have the rule of
their 99th percentile, and are not judged themselves. CPU time is that of all trainings, predictions
and orders on one thread.

Epochs and learning rates were chosen with the seeds 101 and 102, which are not among those of the
runs, by the mean AUROC over the four noises, with one seed each. For cleanlab 3, 6 and 12 epochs
were tried, with 0.01, 0.03 and 0.1, in one of its five folds. The fewest epochs within 0.0005 of
the best were to be taken, which are 12; more were not tried. A tenth of this time allows 4 epochs
of `label_issues`. Its learning rate and that of the loss are the best of the same three. Threshold
samples and the short form take over the learning rate of the whole method. The long trainings of
the last table have the first 12,000 samples and 40 epochs, and nothing was chosen for them.

Before the runs it was fixed that the claim holds with a noise if the interval of the difference in
AUROC is above 0, and if cleanlab takes {TIMES} times the CPU time or more. The claim is confirmed
if it holds with all four noises, partly confirmed if it holds with some, and else not confirmed.
"""


def settings(scope: Scope) -> list[Settings]:
    """The methods at each noise, a long training at one, and one training without noise."""
    if not scope.sources.has(FASHION_MNIST):
        return []
    found = []
    methods = QUICK if scope.quick else [name for name in METHODS if name != LONG]
    for seed in scope.seeds:
        cases = [
            (name, noise)
            for noise in (TWO_NOISES if scope.quick else NOISES)
            for name in methods
            if name not in AT_TWO_NOISES or noise in TWO_NOISES
        ]
        if not scope.quick:
            cases.append((LONG, TWO_NOISES[0]))
            cases += [(LABEL_ISSUES, (SYMMETRIC, 0.0))] if seed == 0 else []
        found += [one(name, *noise, seed, scope.quick or name == LONG) for name, noise in cases]
    return found


def is_possible(settings: Settings) -> bool:
    """cleanlab may be missing."""
    return settings["method"] != CLEANLAB or importlib.util.find_spec("cleanlab") is not None


def one(name: str, noise: str, rate: float, seed: int, is_small: bool) -> Settings:
    """One run. Another version of cleanlab is another run."""
    method = METHODS[name]
    has_version = method["method"] == CLEANLAB and is_possible(method)
    return {
        "data": FASHION_MNIST,
        "samples": FEW_SAMPLES if is_small else SAMPLES,
        "name": name,
        **method,
        "noise": noise,
        "rate": rate,
        "seed": seed,
        **({"cleanlab": importlib.metadata.version("cleanlab")} if has_version else {}),
    }


Groups = dict[str, dict[str, list[Row]]]


def grouped(rows: list[Row]) -> Groups:
    """The rows of each noise and method, without the long trainings."""
    found: Groups = {}
    for row in rows:
        if row["rate"] and row["name"] != LONG:
            found.setdefault(noise_of(row), {}).setdefault(row["name"], []).append(row)
    return found


def noise_of(row: Row) -> str:
    """The noise in words."""
    return f"{row['noise']} ({100 * row['rate']:g} %)"


def values(rows: list[Row], score: str = "") -> list[float]:
    """The AUROC of each run, or that of another score of the same training."""
    return [row["auroc_by"][score] if score else row["auroc"] for row in rows]


def compared(methods: dict[str, list[Row]], other: str, score: str = "") -> tuple[Interval, ...]:
    """How much larger the AUROC of ``label_issues`` is, and how much longer the other takes."""
    ours, theirs = methods[LABEL_ISSUES], methods[other]
    seconds = [[row["process_seconds"] for row in group] for group in (ours, theirs)]
    return paired_difference(values(theirs), values(ours, score)), paired_ratio(*seconds)


def report(rows: list[Row]) -> Report:
    """The outcome is that against cleanlab with 5 folds."""
    groups = grouped(rows)
    tables = [method_table(groups), difference_table(groups), score_table(rows)]
    if any(OTHER not in methods for methods in groups.values()):
        text = "Nothing was compared, because cleanlab is missing: run `pip install cleanlab`."
        return Report("not confirmed", text, tables, notes(rows))
    found = {noise: compared(methods, OTHER) for noise, methods in groups.items()}
    holds = [n for n, (auroc, times) in found.items() if auroc.low > 0 and times.value >= TIMES]
    outcome: Literal["confirmed", "partly confirmed", "not confirmed"] = "partly confirmed"
    if len(holds) in (0, len(found)):
        outcome = "confirmed" if holds else "not confirmed"
    return Report(outcome, verdict(groups, holds), tables, notes(rows))


def verdict(groups: Groups, holds: list[str]) -> str:
    """With how many noises the claim holds, the differences, the worst first, and the loss."""
    order = sorted(groups, key=holds.__contains__)
    differences = [
        f"{noise} {compared(groups[noise], OTHER)[0].text(4)}, "
        f"{compared(groups[noise], OTHER)[1].text(1)}"
        for noise in order
    ]
    better = sum(compared(groups[noise], LOSS)[0].high < 0 for noise in order)
    return (
        f"The claim holds with {len(holds)} of {len(order)} noises. The AUROC of "
        "`label_issues` less that of cleanlab, and how many times its CPU time cleanlab takes: "
        f"{'; '.join(differences)}. The loss of the trained network, at equal cost, has a larger "
        f"AUROC than `label_issues` with {better} of {len(order)} noises, by intervals below 0."
    )


def notes(rows: list[Row]) -> list[str]:
    """How to read the tables, and what a look at unchanged labels gave."""
    found = ["Intervals are those of 95 %, over pairs of runs with the same seed."]
    versions = sorted({row["cleanlab"] for row in rows if "cleanlab" in row})
    found += [f"The version of cleanlab is {', '.join(versions)}."] if versions else []
    return found + [looked_at(row["sheet"]["indices"]) for row in rows if "sheet" in row]


def method_table(groups: Groups) -> Table:
    """Every method at every noise."""
    cells = [
        (
            noise,
            name,
            str(rows[0]["epochs"]),
            f"{rows[0]['learning_rate']:g}",
            *(mean_sd([row[key] for row in rows], 4) for key in ("auroc", "average_precision")),
            *(
                mean_sd([row[key] for row in rows]) if key in rows[0] else ""
                for key in ("precision", "recall")
            ),
            mean_sd([row["process_seconds"] for row in rows], 1),
        )
        for noise, methods in groups.items()
        for name, rows in methods.items()
    ]
    numbers = "epochs", "learning rate", "AUROC", "average precision", "precision", "recall"
    return Table(
        "Mean and standard deviation over seeds. Precision and recall are those of the labels that "
        "a method itself takes for wrong.",
        ("changed labels", "method", *numbers, "CPU seconds"),
        cells,
    )


def difference_table(groups: Groups) -> Table:
    """``label_issues`` beside each other method."""
    cells = []
    for noise, methods in groups.items():
        pairs = [(other, "") for other in methods if other != LABEL_ISSUES]
        pairs += [(OTHER, LAST)] if OTHER in methods else []
        for other, score in pairs:
            auroc, seconds = compared(methods, other, score)
            ours = '`by="margin"`' if score else "default"
            cells.append((noise, ours, other, auroc.text(4), seconds.text()))
    return Table(
        "How much larger the AUROC of `label_issues` is than that of another method, and how many "
        "times its CPU time the other method takes. The default order is that by the mean margin "
        'over all visits (AUM); `by="margin"` is that by the margin at the last visit.',
        ("changed labels", "order", "other method", "difference in AUROC", "CPU time"),
        cells,
    )


def score_table(rows: list[Row]) -> Table:
    """Several scores of the same trainings."""
    trainings: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if "auroc_by" in row:
            key = noise_of(row), row["samples"], row["epochs"]
            trainings.setdefault(key, []).append(row)
    cells = [
        (
            noise,
            f"{samples:,}",
            str(epochs),
            *(mean_sd(values(own, score), 4) for score in ("aum", LAST, TRAINED)),
            paired_difference(values(own, TRAINED), values(own, "aum")).text(4),
        )
        for (noise, samples, epochs), own in trainings.items()
    ]
    return Table(
        "AUROC of several margins of the same trainings with `TrainingDynamics`, and the first "
        "less the third.",
        (
            *("changed labels", "samples", "epochs", "mean over all visits (AUM)"),
            *("at the last visit", "of the trained network", "difference"),
        ),
        cells,
    )


def draw(rows: list[Row], figure: "Figure") -> None:
    """AUROC against CPU seconds, a panel for each noise."""
    groups = grouped(rows)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure.set_size_inches(4.5 * columns, 3.3 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (noise, methods) in zip(panels, groups.items(), strict=True):
        for name, own in methods.items():
            values = np.array([(row["process_seconds"], row["auroc"]) for row in own])
            spread = values.std(0, ddof=1) if len(own) > 1 else np.zeros(2)
            color = f"C{list(METHODS).index(name)}"
            axes.errorbar(*values.mean(0), spread[1], spread[0], "o", color=color, label=name)
        axes.set(title=noise, xlabel="CPU seconds", ylabel="AUROC", xscale="log")
        axes.set_xticks((5, 10, 20, 50, 100), ("5", "10", "20", "50", "100"))
        axes.minorticks_off()
    legends = [axes.get_legend_handles_labels() for axes in figure.axes]
    figure.legend(*max(legends, key=lambda one: len(one[1])), loc="outside lower center", ncols=3)


CLAIM = Claim(
    name="label_issues",
    title="Changed labels found by one training",
    statement="The order of `TrainingDynamics.label_issues` after one ordinary training finds "
    "changed labels better (AUROC) than the label quality of cleanlab, which is made of "
    "out-of-sample probabilities, in a tenth of its CPU time.",
    source="marginops",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
    draw_sheet=draw_sheet,
    is_possible=is_possible,
)

if __name__ == "__main__":
    sys.exit(main(CLAIM))
