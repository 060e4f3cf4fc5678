"""The table, the conclusion and the figure of the demo, for results that are made up."""

import argparse
import dataclasses
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from helpers.demo_results import history, results
from marginops.commands.demo.figure import draw
from marginops.commands.demo.report import (
    conclusion,
    frontier,
    table,
    target_accuracy,
    time_to_reach,
)

OPTIONS = argparse.Namespace(candidates=10, label_noise=0.0)


def test_the_time_to_reach_is_on_the_frontier_of_finished_runs() -> None:
    # A run is at 0.9 on its way, but what counts is where it ends.
    short = [history("stale_margin", 50, [0.1, 0.9, end], 2.0) for end in (0.5, 0.7)]
    long = [history("stale_margin", 100, [0.1, 0.9, 0.8], seconds) for seconds in (6.0, 10.0)]
    budgets = {50: short, 100: long}
    line = frontier(budgets)
    assert line.accuracies.tolist() == pytest.approx([0.6, 0.8])
    assert np.exp(line.log_costs).tolist() == pytest.approx([2.0, 8.0])
    assert time_to_reach(0.6, budgets) == pytest.approx(2.0)
    assert time_to_reach(0.7, budgets) == pytest.approx(4.0)
    assert time_to_reach(0.8 - 1e-12, budgets) == pytest.approx(8.0)
    assert time_to_reach(0.5, budgets) == pytest.approx(2.0)
    assert time_to_reach(0.81, budgets) is None
    assert time_to_reach(0.7, {100: long}) == pytest.approx(8.0)


def test_the_target_is_the_final_accuracy_of_the_longest_uniform_runs() -> None:
    shown = results(uniform=[0.90, 0.92], stale=[0.95, 0.95], minimal=[0.95, 0.95])
    assert target_accuracy(shown) == pytest.approx(0.91)
    assert time_to_reach(target_accuracy(shown), shown["uniform"]) == pytest.approx(2.0)


def test_the_table_has_a_line_for_each_sampling_and_budget() -> None:
    shown = results(uniform=[0.90, 0.92], stale=[0.95, 0.95], minimal=[0.80, 0.82])
    header, _, *lines = table(shown, "CPU seconds").splitlines()
    assert re.split("  +", header) == [
        *("sampling", "updates", "test accuracy", "back-propagated", "scored", "CPU seconds"),
        "to 91.00 %",
    ]
    cells = [re.split("  +", line) for line in lines]
    assert [row[:2] for row in cells] == [
        [name, updates]
        for name in ("uniform", "stale margins", "minimal margin")
        for updates in ("50", "100")
    ]
    assert cells[1][2:] == ["91.00 ± 1.41 %", "1,600", "0", "2.00 ± 0.00", "2.00"]
    assert cells[2][2:] == ["93.00 ± 0.00 %", "800", "0", "1.10 ± 0.00"]
    assert cells[3][2:] == ["95.00 ± 0.00 %", "1,600", "0", "2.20 ± 0.00", "1.10"]
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
                rf"1\.10, 1\.8 times as fast\. {WINS}\(0\.71 points\), so stale margins win\.",
                rf"not reached\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
            ],
        ),
        (
            [0.900, 0.901],
            [0.60, 0.601],
            [0.905, 0.906],
            [
                rf"not reached\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
                rf"5\.05, 2\.5 times as long\. {WINS}\(0\.07 points\), so uniform sampling wins\.",
            ],
        ),
        (
            [0.90, 0.94],
            [0.90, 0.93],
            [0.92, 0.98],
            [rf"not reached\. {CHANCE}", r"3\.00, 1\.5 times as long\. Half of the"],
        ),
        (
            [0.90],
            [0.95],
            [0.89],
            [r"fast\. One seed does not show", r"not reached\. One seed does not"],
        ),
    ],
)
def test_conclusion_says_what_happened(
    uniform: list[float], stale: list[float], minimal: list[float], expected: list[str]
) -> None:
    text = conclusion(results(uniform, stale, minimal), OPTIONS, "CPU seconds")
    baseline, *others, _ = text.splitlines()
    assert re.fullmatch(
        r"Uniform sampling reaches 9\d\.\d\d % test accuracy in 2\.00 CPU seconds, with at most "
        r"100 updates\.",
        baseline,
    )
    for line, name, part, cost in zip(
        others,
        ("Stale margins: ", "Minimal margin: "),
        expected,
        (
            "Stale margins score nothing.",
            "Minimal margin scores 10 candidates for each trained sample.",
        ),
        strict=True,
    ):
        assert line.startswith(name) and line.endswith(cost)
        assert re.search(part, line), line


def test_a_fast_minimal_margin_may_win() -> None:
    shown = results([0.900, 0.901], [0.60, 0.601], [0.98, 0.981], minimal_seconds=1.0)
    assert re.search(
        r"Minimal margin: 0\.50, 4\.0 times as fast\. .*so minimal margin wins\.",
        conclusion(shown, OPTIONS, "s"),
    )


ENOUGH = r"\. Half of the updates are enough: lower --updates to see who is faster\."


def test_no_winner_where_the_smallest_budget_is_more_than_enough() -> None:
    # Minimal margin takes longer, but a smaller budget of it might not.
    shown = results([0.900, 0.901], [0.88, 0.881], [0.98, 0.981], minimal_seconds=5.0)
    _, _, minimal, _ = conclusion(shown, OPTIONS, "s").splitlines()
    assert re.search(r"2\.50, 1\.2 times as long" + ENOUGH, minimal), minimal
    # Uniform runs become worse.
    shown = results([0.900, 0.901], [0.95, 0.951], [0.60, 0.601])
    worse = {**shown, "uniform": {50: shown["stale_margin"][50], 100: shown["uniform"][100]}}
    _, stale, minimal, _ = conclusion(worse, OPTIONS, "s").splitlines()
    assert re.search(r"1\.10, 1\.0 times as fast" + ENOUGH, stale), stale
    assert "not reached. This is more than" in minimal and "uniform sampling wins" in minimal
    worse = results([0.90, 0.94], [0.5, 0.5], [0.90, 0.93])
    worse = {**worse, "uniform": {50: worse["uniform"][100], 100: worse["uniform"][100]}}
    *_, minimal, _ = conclusion(worse, OPTIONS, "s").splitlines()
    assert "not reached. This is within the spread" in minimal


def test_the_samples_that_are_left_out_are_named() -> None:
    options = argparse.Namespace(candidates=10, label_noise=0.125)
    text = conclusion(results([0.9], [0.9], [0.9]), options, "s")
    assert "Stale margins score nothing and leave out what looks mislabelled." in text


def test_a_single_update_is_one() -> None:
    budgets = {1: [history("uniform", 1, [0.1, 0.5], 1.0)]}
    shown = {name: budgets for name in ("uniform", "stale_margin", "minimal_margin")}
    assert "with at most 1 update.\n" in conclusion(shown, OPTIONS, "seconds")


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_shows_the_runs(seeds: int) -> None:
    shown = results([0.90, 0.94][:seeds], [0.97, 0.95][:seeds], [0.96, 0.94][:seeds])
    figure = draw(shown, "subtitle", "CPU seconds", None)
    by_time, by_update, margins = figure.axes
    assert "CPU seconds" in by_time.get_xlabel() and by_time.get_xscale() == "log"
    curves = [line for line in by_time.lines if line.get_linestyle() != ":"]
    ends = [line for line in by_time.lines if line.get_marker() == "o"]
    expected = [runs for budgets in shown.values() for runs in budgets.values()]
    for line, other, runs in zip(curves, by_update.lines, expected, strict=True):
        mean = torch.tensor([one.test_accuracy for one in runs]).mean(0)[1:]
        seconds = torch.tensor([one.seconds for one in runs]).mean(0)[1:]
        torch.testing.assert_close(torch.as_tensor(line.get_xdata()), seconds)
        assert other.get_xdata().tolist() == list(runs[0].updates[1:])
        for drawn in (line, other):
            torch.testing.assert_close(torch.as_tensor(drawn.get_ydata()), mean)
    for line, budgets in zip(ends, shown.values(), strict=True):
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert time_to_reach(y, budgets) == pytest.approx(x)
    target = target_accuracy(shown)
    (horizontal,) = set(by_time.lines) - {*curves, *ends}
    assert horizontal.get_ydata() == [target, target]
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
