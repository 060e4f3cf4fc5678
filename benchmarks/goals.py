"""The goals for an H100, and which of them the results of a GPU reach.

python benchmarks/goals.py benchmarks/results/<gpu>.csv
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tables import Row, copy_rate, markdown, milliseconds, rate_of, read_results, time_of

Case = dict[str, Row]  # the rows of one op, shape and dtype, by provider
Figure = Callable[[Case, float], float]  # takes a case and the rate of a copy
Write = Callable[[float], str]


def share_of_copy(case: Case, copied: float) -> float:
    return rate_of(case["marginops"]) / copied


def gpu_ms(case: Case, _: float) -> float:
    return time_of(case["marginops"])


def extra_mib(case: Case, _: float) -> float:
    return float(case["marginops"]["peak_mib"])


def faster_than(other: str) -> Figure:
    return lambda case, _: time_of(case[other]) / time_of(case["marginops"])


def sooner_than(other: str) -> Figure:
    """The ratio of the times of whole calls."""
    return lambda case, _: float(case[other]["median_ms"]) / float(case["marginops"]["median_ms"])


def smaller_than(other: str) -> Figure:
    return lambda case, _: float(case[other]["peak_mib"]) / extra_mib(case, 0)


def over_product(case: Case, _: float) -> float:
    return time_of(case["marginops"]) / time_of(case["product"])


@dataclass(frozen=True)
class Goal:
    """The ``figure`` of every case of an op is at least, or at most, ``bound``."""

    name: str
    op: str  # a regular expression, as is shape
    shape: str
    figure: Figure
    bound: float
    write: Write
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


READERS = r"minimal_margin_score( of \w+)?|classification_margin|sample_statistics"
COLUMNS = r"( x 64)?(, \w+)?"
SELECTION = ("select_smallest", ".*")
SELECTION_OF_FEW = ("select_smallest", "10{3,5}, .*")
SELECTION_OF_MANY = ("select_smallest", "10{6,8}, .*")
BATCH = ("select_minimal_margin|select_classification_margin", r"1280 x .*")
HEAD = ("linear_sample_statistics", "8192 x 4096 x 128000")
MOMENTS = ("class_moments", "1000000 x 512 x 1000")
REGULARIZATION = ("multi_margin_regularization.*", "8192 x 2048 x 1000")


def percent(value: float) -> str:
    return f"{value:.0%}"


def ratio(value: float) -> str:
    return f"{value:.2f} x"


def mib(value: float) -> str:
    return f"{value:.0f} MiB"


def copy_goal(rows: str, shape: str, share: float) -> Goal:
    name = f"scores, margins, statistics of {rows}: share of a copy"
    return Goal(name, READERS, shape + COLUMNS, share_of_copy, share, percent)


def at_most(name: str, op: tuple[str, str], figure: Figure, bound: float, write: Write) -> Goal:
    return Goal(name, *op, figure, bound, write, at_most=True)


def at_least(name: str, op: tuple[str, str], figure: Figure, bound: float) -> Goal:
    return Goal(name, *op, figure, bound, ratio)


GOALS = [
    copy_goal("long rows", r"\d+ x (1024|8192|131072)", 0.9),
    copy_goal("short rows", r"\d{6,} x 100?", 0.8),
    copy_goal("few rows", r"4 x 1000000", 0.6),
    at_most("selection from a batch: GPU time", BATCH, gpu_ms, 0.010, milliseconds),
    at_least("selection from a batch: whole call, to eager", BATCH, sooner_than("eager"), 4),
    at_least("selection from a batch: whole call, to compiled", BATCH, sooner_than("compile"), 1.5),
    at_least("`select_smallest` of few: to topk", SELECTION_OF_FEW, faster_than("topk"), 3),
    at_least("`select_smallest` of many: to topk", SELECTION_OF_MANY, faster_than("topk"), 1.5),
    at_least("`select_smallest`: to flashinfer", SELECTION, faster_than("flashinfer"), 1),
    at_most("head: time over the product", HEAD, over_product, 1.08, ratio),
    at_most("head: extra memory", HEAD, extra_mib, 256, mib),
    at_least("head: time, to Liger", HEAD, faster_than("liger"), 1),
    at_least("head: memory, to Liger", HEAD, smaller_than("liger"), 1),
    at_least("head: time, to cut-cross-entropy", HEAD, faster_than("cut_cross_entropy"), 1),
    at_least("head: memory, to cut-cross-entropy", HEAD, smaller_than("cut_cross_entropy"), 1),
    Goal("`class_moments`: share of a copy", *MOMENTS, share_of_copy, 0.8, percent),
    at_least("regularization with gradients: to eager", REGULARIZATION, faster_than("eager"), 5),
]


def goals_table(rows: list[Row]) -> str:
    """A line for each goal: the number of cases that reach it, and the worst case."""
    copied = copy_rate(rows)
    if copied is None:
        raise ValueError("rows: expected results of a GPU with the op 'copy', got none with it")
    cases: dict[tuple[str, str, str], Case] = {}
    for row in rows:
        cases.setdefault((row["op"], row["shape"], row["dtype"]), {})[row["provider"]] = row
    lines = [markdown(["goal", "bound", "reached", "worst", "at"]), "|---|---:|---:|---:|---|"]
    for goal in GOALS:
        found: list[tuple[float, str]] = []
        for (op, shape, dtype), case in cases.items():
            if re.fullmatch(goal.op, op) and re.fullmatch(goal.shape, shape):
                try:
                    found.append((goal.figure(case, copied), f"`{op}` {shape}, {dtype}"))
                except KeyError:  # a provider that did not run
                    continue
        bound = ("<= " if goal.at_most else ">= ") + goal.write(goal.bound)
        if found:
            value, where = (max if goal.at_most else min)(found)
            count = sum(goal.reached(value) for value, _ in found)
            cells = [f"{count} of {len(found)}", goal.write(value), where]
        else:
            cells = ["not measured", "-", "-"]
        lines.append(markdown([goal.name, bound, *cells]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(goals_table(read_results(Path(sys.argv[1]))))
