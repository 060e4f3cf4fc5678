"""The verdict and the tables of the last-layer claim."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from harness.claim import Report, Row, Table
from harness.data import FASHION_MNIST
from harness.statistics import Interval, mean_sd, paired_ratio
from trainings.last_layer import PROPERTIES

RESNET, PERCEPTRON = "ResNet-18", "ReLU network with biases"
LAYER_NORM, BRANCH = "ReLU network with layer norm", "residual branch without norm"
TOY = "t1 x1 + t2 t3 x2"
NETWORKS = (RESNET, LAYER_NORM, PERCEPTRON, BRANCH, TOY)
LOSSES = ("exponential", "logistic")
NORMS = {"none": "none", "batch": "batch norm", "layer": "layer norm"}
MEASURES = {
    "nc1": "NC1",
    "nc2_norm_means": "NC2, lengths",
    "nc2_angle_means": "NC2, angles",
    "nc3": "NC3",
    "nc4": "NC4",
}
DECISIVE = ("nc1", "nc2_norm_means", "nc2_angle_means")
TAU, LARGEST, FROBENIUS = range(3)


def expected_rate(network: str, name: str, last: Sequence[str]) -> Fraction:
    """The rate of a parameter as the theory has it; ``last`` are those of the last layer."""
    if network in (RESNET, LAYER_NORM):
        return Fraction(name in last)
    if network == PERCEPTRON:
        layer = ["1", "3", "5"].index(name.split(".")[0]) + 1
        return Fraction(layer if name.endswith("bias") else 1, 3)
    if network == BRANCH:
        return Fraction(not name.startswith("branch"), 2)
    return Fraction(1, 1 if name == "single" else 2)


def rate_error(row: Row) -> float:
    """The largest difference of a rate from the expected one."""
    last = list(row["rates"])[-2:]
    return max(
        abs(rate - float(expected_rate(row["network"], name, last)))
        for name, rate in row["rates"].items()
    )


def rates_text(rates: dict[str, float]) -> str:
    """The parameters of every rate, the largest rate first."""
    groups: dict[float, list[str]] = {}
    for name, rate in rates.items():
        groups.setdefault(rate, []).append(name)
    texts = []
    for rate in sorted(groups, reverse=True):
        names = groups[rate]
        listed = ", ".join(f"`{name}`" for name in names)
        if len(names) > 4:
            listed = f"the other {len(names)}"
        texts.append(f"{listed}: {Fraction(rate).limit_denominator(100)}")
    return "; ".join(texts)


def part_of(rows: list[Row], part: str, **values: Any) -> list[Row]:
    """The rows of a part with these settings, by seed."""
    found = [
        row
        for row in rows
        if row["part"] == part and all(row[key] == value for key, value in values.items())
    ]
    return sorted(found, key=lambda row: row["seed"])


def data_of(rows: list[Row], part: str) -> list[str]:
    """The data sets of a part, in the order of its rows."""
    return list(dict.fromkeys(row["data"] for row in part_of(rows, part)))


def share_of_optimum(row: Row) -> float:
    """The margin that a flow reached, as a share of the largest."""
    return row["reached"] / row["optimum"]


def largest_possible(row: Row) -> float:
    """The largest smallest margin behind a normalisation, for a last layer of norm 1.

    Features of D numbers have a mean square length of D there. So no margin of C balanced classes
    exceeds sqrt(C D) / (C - 1), and collapsed features reach it.
    """
    return float(np.sqrt(10 * row["width"]) / 9)


def mean_percent(shares: list[float], digits: int = 0) -> str:
    """The mean of shares, in percent."""
    return f"{100 * float(np.mean(shares)):.{digits}f} %"


def collapse_at_end(rows: list[Row], name: str) -> list[float]:
    """A property of neural collapse after the last step, by seed."""
    return [row["end"]["collapse"][PROPERTIES.index(name)] for row in rows]


def nc1_at_equal_loss(rows: list[Row], data: str, norm: str) -> tuple[list[float], list[float]]:
    """NC1 without and with a norm, where both networks have the lowest loss that both reach."""
    found: tuple[list[float], list[float]] = ([], [])
    pair = [part_of(rows, "collapse", data=data, norm=one) for one in ("none", norm)]
    for both in zip(*pair, strict=True):
        level = max(row["curve"][-1][1] for row in both)
        for values, row in zip(found, both, strict=True):
            curve = np.array(row["curve"])
            logs = np.interp(-level, -curve[:, 1], np.log(curve[:, 5]))
            values.append(float(np.exp(logs)))
    return found


def report(rows: list[Row]) -> Report:
    """The verdict and its tables."""
    rated, flows = part_of(rows, "rates"), part_of(rows, "flow")
    worst_rate = max(map(rate_error, rated))
    is_exact = worst_rate < 1e-12 and max(row["scaling_error"] for row in rated) < 1e-9
    worst_flow = max(abs(1 - share_of_optimum(row)) for row in flows)
    is_optimal = worst_flow <= 0.01
    faults = collapse_faults(rows)
    outcome: Any = "not confirmed"
    if is_exact and is_optimal:
        outcome = "partly confirmed" if faults else "confirmed"
    failures = [] if is_exact else ["not all rates are those of the theory"]
    failures += [] if is_optimal else ["not every flow comes within 1 % of its optimum"]
    failures += faults
    accuracy = f"up to {worst_rate:.1g}" if worst_rate else "without any difference"
    verdict = (
        f"The rates are those of the theory {accuracy}. All {len(flows)} flows end within "
        f"{100 * worst_flow:.2f} % of their optimum. Behind a norm NC1 ends at {nc1_text(rows)} of "
        "its value without one."
    )
    if failures:
        verdict = f"The claim fails: {'; '.join(failures)}. {verdict}"
    tables = [rates_table(rated), flow_table(rows), margin_table(rows), collapse_table(rows)]
    return Report(outcome, verdict, tables, notes(rows))


def nc1_text(rows: list[Row]) -> str:
    """The smallest and the largest ratio of NC1 behind a norm and without one."""
    ratios = [
        ratio_of(rows, data, norm, "nc1").value
        for data in data_of(rows, "collapse")
        for norm in ("batch", "layer")
    ]
    low, high = (f"{100 * value:.1f}" for value in (min(ratios), max(ratios)))
    return f"{low} to {high} %"


def ratio_of(rows: list[Row], data: str, norm: str, name: str) -> Interval:
    """A property behind a norm, divided by that without, with its interval."""
    first, second = (
        collapse_at_end(part_of(rows, "collapse", data=data, norm=one), name)
        for one in ("none", norm)
    )
    return paired_ratio(first, second)


def collapse_faults(rows: list[Row]) -> list[str]:
    """In words, where the third part fails."""
    faults = []
    for data in data_of(rows, "collapse"):
        for norm in ("batch", "layer"):
            where = f"behind the {NORMS[norm]} on {data}"
            faults += [
                f"{MEASURES[name]} is not clearly smaller {where}"
                for name in DECISIVE
                if not ratio_of(rows, data, norm, name).high < 1
            ]
            grew = [margin_grew(row) for row in part_of(rows, "collapse", data=data, norm=norm)]
            if not all(grew):
                count = f"{grew.count(False)} of {len(grew)} runs"
                faults.append(f"the margin does not grow {where} in {count}")
    return faults


def margin_grew(row: Row) -> bool:
    """Whether the margin in the norm of the largest rate grew after separation."""
    ends = row["end"]["margins"][LARGEST]
    return bool(row["separated"]) and ends > row["separated"]["margins"][LARGEST]


def rates_table(rated: list[Row]) -> Table:
    """The rates, network by network."""
    return Table(
        "1. Rates of the parameters. The last layer is `14` in ResNet-18, `6` after the layer norm "
        "and `5` in the network with biases. Error of scaling: relative difference between the "
        "output of the grown parameters and e times the output before.",
        ("network", "numbers", "rates", "error of scaling"),
        [
            (
                row["network"],
                f"{row['numbers']:,}",
                rates_text(row["rates"]),
                f"{row['scaling_error']:.0e}",
            )
            for row in rated
        ],
    )


def flow_table(rows: list[Row]) -> Table:
    """Where the flows end."""
    cells = []
    for data in data_of(rows, "flow"):
        for loss in LOSSES:
            some = part_of(rows, "flow", data=data, loss=loss)
            optima = [row["optimum"] for row in some]
            reached = [row["reached"] for row in some]
            smallest = min(map(share_of_optimum, some))
            euclidean = mean_percent([row["euclidean"] / row["optimum"] for row in some], 1)
            margins = mean_sd(optima, 4), mean_sd(reached, 4)
            cells.append((data, loss, *margins, f"{100 * smallest:.2f} %", euclidean))
    return Table(
        "2. Smallest margin divided by the norm of the parameters with the largest rate: optimum, "
        "and end of the gradient flow. The last column is the share of the optimum that the linear "
        "function with the largest Euclidean margin has on average.",
        ("data", "loss", "optimum", "flow", "smallest share of the optimum", "Euclidean"),
        cells,
    )


def margin_table(rows: list[Row]) -> Table:
    """Normalised margins at separation and at the end, and how often they grow."""
    cells = []
    for data in data_of(rows, "collapse"):
        for norm, text in NORMS.items():
            some = part_of(rows, "collapse", data=data, norm=norm)
            first = [row["separated"] for row in some if row["separated"]]
            start = [
                mean_sd([one["step"] for one in first], 0) if first else "-",
                mean_sd([one["margins"][LARGEST] for one in first], 2) if first else "-",
            ]
            ends = [row["end"]["margins"][LARGEST] for row in some]
            shares = [end / largest_possible(row) for end, row in zip(ends, some, strict=True)]
            possible = "" if norm == "none" else mean_percent(shares)
            grew = [
                mean_percent([row["rising"][reading] for row in some])
                for reading in (LARGEST, TAU, FROBENIUS)
            ]
            cells.append((data, text, *start, mean_sd(ends, 2), possible, *grew))
    margins = "step of separation", "margin there", "margin at the end"
    return Table(
        "3. Smallest margin, divided by the norm of the parameters with the largest rate, at "
        "separation and at the end. Possible: the share of the largest margin that any features "
        "behind the norm allow. The last columns are the shares of comparisons after separation in "
        "which the margin grew, for this version, for the version tau, and for the Frobenius norm "
        "of all parameters.",
        ("data", "norm", *margins, "possible", "grew", "grew (tau)", "grew (Frobenius)"),
        cells,
    )


def collapse_table(rows: list[Row]) -> Table:
    """Neural collapse at the end, and its ratios."""
    cells: list[Sequence[str]] = []
    for data in data_of(rows, "collapse"):
        for norm, text in NORMS.items():
            some = part_of(rows, "collapse", data=data, norm=norm)
            cells.append(
                (data, text, *(mean_sd(collapse_at_end(some, name), 4) for name in MEASURES))
            )
        for norm in ("batch", "layer"):
            ratios = [ratio_of(rows, data, norm, name).text(1, 100) for name in DECISIVE]
            cells.append((data, f"{NORMS[norm]} / none, in %", *ratios, "", ""))
    return Table(
        "4. Neural collapse of the training samples at the end, and the ratios of seeds in pairs.",
        ("data", "norm", *MEASURES.values()),
        cells,
    )


def notes(rows: list[Row]) -> list[str]:
    """What a reader has to know beside the tables."""
    gap = max(abs(row["optimum_gap"]) for row in part_of(rows, "flow"))
    equal = [
        f"{paired_ratio(*nc1_at_equal_loss(rows, data, norm)).text(1, 100)} % "
        f"({NORMS[norm]}, {data})"
        for data in data_of(rows, "collapse")
        for norm in ("batch", "layer")
    ]
    texts = [
        f"The optima of part 2 are exact up to a share of {gap:.0e}.",
        "The networks of a pair end at different losses. At the lowest loss that both reach, the "
        f"ratios of NC1 are: {'; '.join(equal)}.",
        "Without a norm only the bias of the last layer has the largest rate. The network can "
        "separate the classes without it. So the margin divided by this bias has no maximum. No "
        "version has to grow all the time: the steps are finite, and the theory speaks of the "
        "limit only.",
    ]
    if FASHION_MNIST not in data_of(rows, "collapse"):
        texts.append(f"The files of {FASHION_MNIST} are missing, so part 3 is without them.")
    return texts
