"""The table, the conclusion and the figure of the demo, for results that are made up."""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("matplotlib")

from helpers.demo_results import history, results
from marginops.commands.demo.figure import draw
from marginops.commands.demo.report import (
    conclusion,
    mean_curve,
    table,
    target_accuracy,
    time_to_reach,
)


def test_the_time_to_reach_is_that_of_the_first_evaluation_in_any_budget() -> None:
    short = [history("stale_margin", 50, [0.1, 0.5, 0.8], seconds) for seconds in (2.0, 4.0)]
    long = [
        history("stale_margin", 100, [0.1, 0.4, 0.9], 8.0),
        history("stale_margin", 100, [0.1, 0.8, 0.9], 8.0),
    ]
    budgets = {50: short, 100: long}
    assert mean_curve(long).accuracy == pytest.approx([0.1, 0.6, 0.9])
    assert mean_curve(short).seconds == pytest.approx([0, 1.5, 3])
    assert time_to_reach(0.5, budgets) == 1.5
    assert time_to_reach(0.55, budgets) == 3.0
    assert time_to_reach(0.6, {100: long}) == 4.0
    assert time_to_reach(0.85, budgets) == 8.0
    assert time_to_reach(0.95, budgets) is None
    assert time_to_reach(0.05, budgets) == 0


def test_the_target_is_the_final_accuracy_of_the_longest_uniform_runs() -> None:
    shown = results(uniform=[0.90, 0.92], stale=[0.95, 0.95], minimal=[0.95, 0.95])
    assert target_accuracy(shown) == pytest.approx(0.91)
    assert time_to_reach(target_accuracy(shown), shown["uniform"]) == 2.0


def test_the_table_has_a_line_for_each_sampling_and_budget() -> None:
    shown = results(uniform=[0.90, 0.92], stale=[0.95, 0.95], minimal=[0.80, 0.82])
    header, _, *lines = table(shown, "CPU seconds").splitlines()
    assert re.split("  +", header) == [
        *("sampling", "updates", "test accuracy", "back-propagated", "scored", "CPU seconds"),
        "until 91.00 %",
    ]
    cells = [re.split("  +", line) for line in lines]
    assert [row[:2] for row in cells] == [
        [name, updates]
        for name in ("uniform", "stale margins", "minimal margin")
        for updates in ("50", "100")
    ]
    assert cells[1][2:] == ["91.00 ± 1.41 %", "1,600", "0", "2.00 ± 0.00", "2.00"]
    assert cells[2][2:] == ["93.00 ± 0.00 %", "800", "0", "1.10 ± 0.00", "1.10"]
    assert cells[3][-1] == "2.20"
    assert cells[5][2:] == ["81.00 ± 1.41 %", "1,600", "16,000", "6.00 ± 0.00", "-"]
    assert "±" not in table(results([0.9], [0.9], [0.9]), "seconds")


WINS = "This is more than the spread over the seeds "
CHANCE = r"This is within the spread over the seeds \(\d\.\d\d points\), so there is no clear win"


@pytest.mark.parametrize(
    ("uniform", "stale", "minimal", "expected"),
    [
        (
            [0.900, 0.901],
            [0.95, 0.96],
            [0.80, 0.801],
            [
                rf"1\.10: 1\.8 times as fast\. {WINS}\(0\.71 points\), so stale margins win\.",
                rf"did not reach it\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
            ],
        ),
        (
            [0.900, 0.901],
            [0.60, 0.601],
            [0.98, 0.981],
            [
                rf"did not reach it\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
                rf"3\.00: 1\.5 times as long\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
            ],
        ),
        (
            [0.90, 0.94],
            [0.90, 0.93],
            [0.92, 0.98],
            [rf"did not reach it\. {CHANCE}", rf"3\.00: 1\.5 times as long\. {WINS}"],
        ),
        ([0.90], [0.95], [0.89], [r"fast\. One seed does not show", r"it\. One seed does not"]),
    ],
)
def test_conclusion_says_what_happened(
    uniform: list[float], stale: list[float], minimal: list[float], expected: list[str]
) -> None:
    baseline, *others = conclusion(results(uniform, stale, minimal), 10, "CPU seconds").splitlines()
    assert re.fullmatch(
        r"Uniform sampling ends at \d\d\.\d\d % test accuracy after 100 updates\. It first reached "
        r"this accuracy after 2\.00 CPU seconds\.",
        baseline,
    )
    for line, name, part, cost in zip(
        others,
        ("Stale margins ", "Minimal margin "),
        expected,
        ("They score nothing.", "It scores 10 candidates for each trained sample."),
        strict=True,
    ):
        assert line.startswith(name) and line.endswith(cost)
        assert re.search(part, line), line


def test_a_fast_minimal_margin_may_win() -> None:
    shown = results([0.900, 0.901], [0.60, 0.601], [0.98, 0.981], minimal_seconds=1.0)
    assert re.search(
        r"Minimal margin reached it after 0\.50: 4\.0 .*so minimal margin wins\.",
        conclusion(shown, 10, "s"),
    )


def test_a_single_update_is_one() -> None:
    budgets = {1: [history("uniform", 1, [0.1, 0.5], 1.0)]}
    shown = {name: budgets for name in ("uniform", "stale_margin", "minimal_margin")}
    assert "after 1 update. " in conclusion(shown, 10, "seconds")


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_shows_the_runs(seeds: int) -> None:
    shown = results([0.90, 0.94][:seeds], [0.97, 0.95][:seeds], [0.96, 0.94][:seeds])
    figure = draw(shown, "subtitle", "CPU seconds", None)
    by_time, by_update, margins = figure.axes
    assert "CPU seconds" in by_time.get_xlabel() and by_time.get_xscale() == "log"
    expected = [(runs, name) for name, budgets in shown.items() for runs in budgets.values()]
    curves = [line for line in by_time.lines if len(line.get_xdata()) == 2]
    # The last is the horizontal line.
    for line, other, (runs, _) in zip(curves[:-1], by_update.lines, expected, strict=True):
        mean = torch.tensor([one.test_accuracy for one in runs]).mean(0)[1:]
        seconds = torch.tensor([one.seconds for one in runs]).mean(0)[1:]
        torch.testing.assert_close(torch.as_tensor(line.get_xdata()), seconds)
        assert other.get_xdata().tolist() == list(runs[0].updates[1:])
        for drawn in (line, other):
            torch.testing.assert_close(torch.as_tensor(drawn.get_ydata()), mean)
    target = target_accuracy(shown)
    assert curves[-1].get_ydata() == [target, target]
    dots = [line for line in by_time.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [
        time for budgets in shown.values() if (time := time_to_reach(target, budgets)) is not None
    ]
    shares = [patch.get_data().values.sum() for patch in margins.patches]
    assert shares == pytest.approx([1, 1, 1, 1], abs=0.02)
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        assert axes.get_legend() is not None


def test_figure_of_equal_margins_and_a_long_title() -> None:
    equal = {
        name: {
            updates: [
                dataclasses.replace(
                    run, margins_before=torch.zeros(9), margins_after=torch.zeros(9)
                )
                for run in runs
            ]
            for updates, runs in budgets.items()
        }
        for name, budgets in results([0.5], [0.5], [0.5]).items()
    }
    figure = draw(equal, "MLP " + "-".join(["64"] * 99), "seconds", None)
    figure.draw_without_rendering()
    _, by_update, margins = figure.axes
    for patch in margins.patches:
        shares, edges, _ = patch.get_data()
        assert shares.sum() == 1 and edges[0] < 0 < edges[-1]
    assert all(tick == int(tick) for tick in by_update.get_xticks())
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_no_legend_of_the_figure_covers_a_curve() -> None:
    figure = draw(results([0.9, 0.94], [0.97, 0.95], [0.9, 0.9]), "subtitle", "seconds", None)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
