"""Comparisons of samplings: what they measure, what they say, and what they refuse."""

import json
import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from marginops.training import Comparison, Stopwatch, TrainingRun, compare
from marginops.training.comparison import frontier

BUDGETS = [1.0, 2.0, 4.0, 8.0]
SEEDS = [3, 1, 4, 15, 9]
SHIFTS = dict(zip(SEEDS, [0.0, 0.02, -0.01, 0.03, 0.01], strict=True))


def law(sampling: str, budget: float, seed: int, stopwatch: Stopwatch) -> tuple[float, float]:
    """Accuracy 0.8 + 0.05 log2(cost); "half" reaches it with half the cost, up to a shift."""
    stopwatch.process_seconds, stopwatch.wall_seconds = 10 * budget, 20 * budget
    better = 2 if sampling == "half" else 1
    shift = SHIFTS[seed] if sampling == "half" else 0
    return 0.8 + 0.05 * math.log2(better * budget) + shift, 100 * budget


@pytest.fixture
def comparison() -> Comparison:
    return compare(law, ["all", "half"], BUDGETS, seeds=SEEDS, baseline="all")


@pytest.mark.parametrize("cost", ["process_seconds", "wall_seconds", "samples"])
def test_the_gain_is_the_ratio_of_costs_and_its_interval_that_of_a_mean(comparison, cost) -> None:
    gain = comparison.gain("half", 0.87, 0.93, cost=cost)
    log_gains = np.log(2) * (1 + np.array([*SHIFTS.values()]) / 0.05)
    expected = stats.t.interval(0.95, 4, log_gains.mean(), stats.sem(log_gains))
    assert gain.value == pytest.approx(math.exp(log_gains.mean()))
    assert (gain.low, gain.high) == pytest.approx(tuple(np.exp(expected)))
    narrower = comparison.gain("half", 0.9, 0.9, cost=cost, confidence=0.5)
    assert gain.low < narrower.low < narrower.value < narrower.high < gain.high
    assert comparison.gain("all").value == pytest.approx(1)


def test_the_range_is_what_both_reach_with_any_seed_left_out(comparison) -> None:
    lowest, highest = comparison.accuracy_range("half")
    shifts = np.array([*SHIFTS.values()])
    assert lowest == pytest.approx(0.85 + (shifts.sum() - shifts.min()) / 4)
    assert highest == pytest.approx(0.95)
    with pytest.raises(ValueError, match=r"expected accuracies inside \[0\.865, 0\.95\], got"):
        comparison.gain("half", 0.8)
    none = compare(
        lambda sampling, *rest: (law(sampling, *rest)[0] + (sampling == "half"), 1),
        ["all", "half"],
        BUDGETS,
        seeds=SEEDS,
    )
    with pytest.raises(ValueError, match="that all and half both reach, but there are none"):
        none.gain("half")
    assert none.to_text().endswith("half: no accuracy that all reaches as well")


def test_the_cost_at_an_accuracy_is_that_of_the_law_and_none_outside(comparison) -> None:
    assert comparison.cost_at("all", 0.8 + 0.05 * math.log2(3)) == pytest.approx(30)
    assert comparison.cost_at("all", 0.9, "samples") == pytest.approx(400)
    mean_shift = sum(SHIFTS.values()) / len(SHIFTS)
    cost = comparison.cost_at("half", 0.86 + mean_shift, "wall_seconds")
    assert cost == pytest.approx(20 * 2**0.2)
    assert comparison.cost_at("all", 0.95) == pytest.approx(80)
    assert comparison.cost_at("all", 0.951) is None
    assert comparison.cost_at("all", 0.799) is None
    with pytest.raises(ValueError, match=r'sampling: expected "all" or "half", got .none.'):
        comparison.cost_at("none", 0.9)


def test_a_frontier_does_not_fall() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 10):
        values = generator.integers(0, 4, (3, size)) / 4.0
        budgets = np.arange(size)
        noisy = generator.uniform(1, 2, (3, size))
        line = frontier.Frontier(noisy, values)
        fit = isotonic.IsotonicRegression().fit_transform
        np.testing.assert_allclose(line.accuracies, fit(budgets, values.mean(0)))
        np.testing.assert_allclose(np.exp(line.log_costs), fit(budgets, noisy.mean(0)))


def test_a_level_part_of_a_frontier_is_reached_at_its_start_and_left_at_its_end() -> None:
    line = frontier.Frontier(np.array([[1.0, 2, 4, 8]]), np.array([[0.1, 0.5, 0.5, 0.9]]))
    costs = np.exp(line.log_cost(np.array([0.1, 0.5, 0.7, 0.9])))
    np.testing.assert_allclose(costs, [1, 2, math.sqrt(32), 8])
    just_above = np.exp(line.log_cost(np.array([0.5 + 1e-9])))
    np.testing.assert_allclose(just_above, 4)


def test_only_the_time_inside_the_stopwatch_counts() -> None:
    def train(sampling, budget, seed, stopwatch):
        if sampling == "measured":
            for _ in range(2):
                with stopwatch:
                    time.sleep(0.02)
        time.sleep(0.1)
        return 0.5, 1

    runs = compare(train, ["measured", "whole"], [1], seeds=1, warm_up=False).runs
    assert 0.04 <= runs[0].wall_seconds < 0.09
    assert runs[1].wall_seconds >= 0.1
    assert all(0 < run.process_seconds < run.wall_seconds for run in runs), "sleep is no CPU time"


def test_a_stopwatch_stops_after_an_error_and_refuses_to_start_twice() -> None:
    stopwatch = Stopwatch()
    with pytest.raises(RuntimeError, match="stopwatch: expected a stopped stopwatch"), stopwatch:
        stopwatch.__enter__()
    with stopwatch:
        pass
    assert stopwatch.wall_seconds > 0


def test_samplings_take_turns_after_a_warm_up() -> None:
    calls, seen = [], []

    def train(*arguments):
        calls.append(arguments[:3])
        return 0.5, 1

    comparison = compare(train, ["a", "b"], [2, 1], seeds=[7, 8], on_run=seen.append)
    assert calls[:2] == [("a", 1, 7), ("b", 1, 7)]
    turns = [(s, b, i) for i in (7, 8) for b in (1, 2) for s in ("a", "b")]
    assert calls[2:] == turns
    assert [(run.sampling, run.budget, run.seed) for run in comparison.runs] == turns
    assert tuple(seen) == comparison.runs
    calls.clear()
    budgets = {"a": [3, 1], "b": [2]}
    own = compare(train, ["a", "b"], budgets, seeds=1, warm_up=False)
    assert calls == [("a", 1, 0), ("b", 2, 0), ("a", 3, 0)]
    assert own.budgets("a") == (1, 3) and own.budgets("b") == (2,)
    calls.clear()
    compare(train, ["a"], [1], seeds=2, warm_up=False)
    assert calls == [("a", 1, 0), ("a", 1, 1)]


def test_rows_survive_json(comparison) -> None:
    rows = json.loads(json.dumps(comparison.to_rows()))
    assert Comparison(tuple(TrainingRun(**row) for row in rows), "all") == comparison
    arrays = compare(
        lambda *_: (np.float32(0.5), np.int64(3)), ["all"], np.array([1, 2]), seeds=torch.arange(2)
    )
    run = json.loads(json.dumps(arrays.to_rows()))[1]
    assert (run["budget"], run["seed"], run["accuracy"], run["samples"]) == (2, 0, 0.5, 3)


def test_the_table_has_a_row_for_each_budget(comparison) -> None:
    lines = comparison.to_text().splitlines()
    assert lines[0].split() == ["sampling", "budget", "samples", "CPU", "s", "accuracy", "gain"]
    assert lines[2].split() == ["all", "2", "200", "20", "0.8500", "+-", "0.0000"]
    whole = comparison.gain("half")
    interval = f"{whole.value:.2f} ({whole.low:.2f} to {whole.high:.2f})"
    for line, accuracy in zip(lines[5:7], ("0.8600", "0.9100"), strict=True):
        assert line.startswith("half") and line.endswith(f"{accuracy} +- 0.0196  {interval}")
    assert lines[8].endswith("  -"), "the baseline does not reach this accuracy"
    assert lines[9].startswith(f"half: gain {whole.value:.2f} ({whole.low:.2f} to ")
    assert len(lines) == 10


def test_one_seed_has_no_interval() -> None:
    alone = compare(law, ["all", "half"], BUDGETS, seeds=[3])
    gain = alone.gain("half")
    assert gain.value == pytest.approx(2)
    assert math.isnan(gain.low) and math.isnan(gain.high)
    assert alone.to_text().splitlines()[6].split()[-2:] == ["0.9000", "2.00"]
    assert "nan" not in alone.to_text()


def test_the_figure_shows_accuracy_against_cost(comparison) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    given = figure_module.Figure().subplots()
    figure, axes = comparison.plot(given, cost="samples")
    assert axes is given and figure is given.get_figure()
    lines = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    assert list(lines) == ["all", "half"]
    np.testing.assert_allclose(lines["half"][:, 0], [100, 200, 400, 800])
    np.testing.assert_allclose(lines["all"][:, 1], [0.8, 0.85, 0.9, 0.95])
    assert axes.get_xlabel() == "back-propagated samples" and axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": 3}, TypeError, "train: expected a function, got int"),
        ({"samplings": "all"}, TypeError, "samplings: expected a list of names, got str"),
        ({"samplings": []}, ValueError, "samplings: expected one or more distinct names"),
        ({"budgets": 3}, TypeError, "budgets: expected a list of numbers, got int"),
        ({"budgets": [1, 1]}, ValueError, "budgets: expected one or more distinct numbers"),
        (
            {"budgets": {"all": [1]}},
            ValueError,
            r"budgets: expected the keys \['all', 'half'\], got",
        ),
        ({"budgets": [0]}, ValueError, "budgets: expected a positive number, got 0"),
        ({"budgets": [math.nan]}, ValueError, "budgets: expected a positive number, got nan"),
        ({"budgets": ["1"]}, TypeError, "budgets: expected a number, got str"),
        ({"seeds": 0}, ValueError, "seeds: expected at least 1, got 0"),
        ({"seeds": [0.5]}, TypeError, "seeds: expected an int, got float"),
        ({"baseline": "none"}, ValueError, 'baseline: expected "all" or "half", got \'none\''),
        ({"train": lambda *_: 0.5}, TypeError, r"train: expected a tuple \(accuracy, .* got float"),
        ({"train": lambda *_: (math.nan, 1)}, ValueError, "train: expected a finite accuracy"),
        ({"train": lambda *_: (1, 0)}, ValueError, "train: number of samples: expected a positive"),
    ],
)
def test_errors_name_what_is_wrong(change, error, message) -> None:
    arguments = {"train": law, "samplings": ["all", "half"], "budgets": [1], "seeds": [3]}
    with pytest.raises(error, match=message):
        compare(**{**arguments, **change})


def test_errors_of_a_comparison_name_what_is_wrong(comparison) -> None:
    with pytest.raises(
        ValueError, match=r"runs: expected one run of each seed .*, 40 in all, got 39"
    ):
        Comparison(comparison.runs[1:], "all")
    with pytest.raises(ValueError, match='baseline: expected "all" or "half", got'):
        Comparison(comparison.runs, "other")
    with pytest.raises(ValueError, match=r'sampling: expected "all" or "half", got'):
        comparison.gain("other")
    with pytest.raises(ValueError, match='baseline: expected "all", got'):
        compare(law, ["all"], [1], seeds=[3], baseline="other")
    with pytest.raises(ValueError, match="runs: expected one or more runs, got none"):
        Comparison((), "all")
    for use in (comparison.plot, comparison.to_text):
        with pytest.raises(ValueError, match='cost: expected "process_seconds", '):
            use(cost="money")
    with pytest.raises(ValueError, match="confidence: expected a number between 0 and 1, got 95"):
        comparison.gain("half", confidence=95)
