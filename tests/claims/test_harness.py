"""The shape of all claims: cached runs, options, statistics, the page."""

import dataclasses
import json
import math
import os
import runpy
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.processes import INSTALLED, alive, python, wait_until

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
RUN = '''"""What one run does."""

from pathlib import Path

from {helper} import scaled


def run(settings, sources):
    """Writes a line for each call."""
    with Path({calls!r}).open("a") as file:
        file.write(f"{{settings['seed']}}\\n")
    if settings["seed"] == {failing}:
        raise RuntimeError("the run fails")
    return {{"error": scaled(settings["seed"]) + settings["width"]}}
'''
NUMBERS = count()
STALLING = """
import os
import time
import torch

def run(settings, sources):
    if settings["seed"] > 1 and os.environ.get("STALLS"):
        time.sleep(3600)
    return {"threads": torch.get_num_threads()}
"""
COMMAND = """
import sys
from harness.claim import Claim, Report
from harness.command import main
from stalling import run

def settings(scope):
    return [{"data": "digits", "seed": seed} for seed in scope.seeds]

def report(rows):
    return Report("confirmed", f"threads {[row['threads'] for row in rows]}", [])

CLAIM = Claim(
    *("toy_claim", "Toys", "Toys stall.", "marginops", "Runs of toys."),
    *(settings, run, report, lambda rows, figure: None),
)
if __name__ == "__main__":
    sys.exit(main(CLAIM, ["--quick", "--seeds", "4"]))
"""
HELPER = "def scaled(seed):\n    return 2 * seed\n"


@pytest.fixture
def toy(claims, monkeypatch, tmp_path):
    """``toy(failing=None)``: a claim of four runs, which write down that they were called."""
    folder = tmp_path / "trainings"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(claims("harness.cache"), "CLAIMS", folder)

    def make(failing: int | None = None):
        # A module is imported once, so each has a name of its own.
        names = [f"{part}_{next(NUMBERS)}" for part in ("helper", "toy")]
        (folder / f"{names[0]}.py").write_text(HELPER)
        text = RUN.format(helper=names[0], calls=str(tmp_path / "calls"), failing=failing)
        (folder / f"{names[1]}.py").write_text(text)
        return claim_of(claims, claims(names[1]).run)

    return make


def claim_of(claims, run):
    shape = claims("harness.claim")

    def settings(scope):
        widths = (1,) if scope.quick else (1, 2)
        return [{"data": "digits", "width": w, "seed": s} for s in scope.seeds for w in widths]

    def report(rows):
        errors = [row["error"] for row in rows]
        table = shape.Table("Errors of all runs.", ["width", "error"], [["narrow", "1.0"]])
        return shape.Report("not confirmed", f"The errors are {errors}.", [table], ["A note."])

    def draw(rows, figure):
        figure.subplots().plot([row["error"] for row in rows])

    return shape.Claim(
        *("toy_claim", "Toys", "Wide is wrong.", "marginops", "Runs of toys."),
        *(settings, run, report, draw),
        seeds=2,
        quick_seeds=1,
    )


@pytest.fixture
def run_here(claims, monkeypatch):
    """Runs of the pool are done in this process, which can import the toys."""

    class Pool:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(claims("harness.command"), "ProcessPoolExecutor", Pool)


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls").read_text().split()]


def test_a_claim_prints_and_writes_what_its_rows_say(claims, toy, run_here, tmp_path, capsys):
    main = claims("harness.command").main
    assert main(toy(), ["--cache", str(tmp_path / "c"), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "**Claim** (marginops): Wide is wrong." in text
    assert "**Not confirmed.** The errors are [1, 2, 3, 4]." in text
    assert "| width | error |\n| --- | ---: |\n| narrow | 1.0 |" in text
    result = json.loads((tmp_path / "out/claims-toy-claim.json").read_text())
    assert [row["error"] for row in result["rows"]] == [1, 2, 3, 4]
    assert all(row["cpu_seconds"] >= 0 for row in result["rows"])
    assert result["quick"] is False
    assert (tmp_path / "out/claims-toy-claim.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_results_are_those_of_all_runs(
    claims, toy, run_here, tmp_path, monkeypatch, seeds, capsys
):
    command = claims("harness.command")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    options = ["--cache", str(tmp_path / "c")]
    assert command.main(toy(), [*options, "--seeds", str(seeds)]) == 0
    assert (tmp_path / "results/claims-toy-claim.json").exists() == (seeds >= 2)
    assert ("not written, as these are not all runs" in capsys.readouterr().err) == (seeds < 2)
    assert command.main(toy(), [*options, "--quick"]) == 0
    assert "not written" in capsys.readouterr().err


def test_runs_that_are_not_possible_are_left_out_and_nothing_is_published(
    claims, toy, run_here, tmp_path, monkeypatch, capsys
):
    command = claims("harness.command")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    claim = dataclasses.replace(toy(), is_possible=lambda settings: settings["width"] == 1)
    assert command.main(claim, ["--cache", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr()
    assert "The errors are [1, 3]." in printed.out
    assert "not written, as these are not all runs" in printed.err
    assert not (tmp_path / "results").exists()


def test_a_claim_without_its_data_is_an_error(claims, toy, tmp_path, capsys):
    claim = dataclasses.replace(toy(), settings=lambda scope: [])
    assert claims("harness.command").main(claim, ["--cache", str(tmp_path / "c")]) == 1
    assert "toy_claim: no data set is there; see --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data-dir", "--mnist", "--texts"])
def test_a_path_that_does_not_exist_is_an_error(claims, toy, option, capsys):
    with pytest.raises(SystemExit):
        claims("harness.command").main(toy(), [option, "nowhere"])
    assert f"{option}: expected a path that exists, got nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "called"), [([], 2), (["toy_claim"], 1)])
def test_an_interruption_ends_all_claims(claims, monkeypatch, names, called):
    stopped = []
    catalogue = [dataclasses.replace(claim_of(claims, None), name=n) for n in ("toy_claim", "b")]
    monkeypatch.setattr(claims("catalogue"), "CLAIMS", catalogue)
    monkeypatch.setattr(sys, "argv", ["claims", *names, "--quick"])

    def main(claim, options):
        assert options == ["--quick"]
        stopped.append(claim.name)
        return 130 if len(stopped) == called else 0

    monkeypatch.setattr(claims("harness.command"), "main", main)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CLAIMS / "__main__.py"), run_name="__main__")
    assert ended.value.code == 130 and len(stopped) == called


@pytest.mark.parametrize("is_found", [True, False])
def test_a_sheet_is_written_if_there_is_something_to_draw(
    claims, toy, run_here, tmp_path, is_found
):
    def draw_sheet(rows, sources, figure):
        assert [row["error"] for row in rows] == [1, 2, 3, 4]
        assert sources.fashion_mnist == tmp_path
        if is_found:
            figure.subplots(2, 2)

    claim = dataclasses.replace(toy(), draw_sheet=draw_sheet)
    folder = tmp_path / "out"
    options = ["--cache", str(tmp_path / "c"), "--output", str(folder)]
    assert claims("harness.command").main(claim, [*options, "--data-dir", str(tmp_path)]) == 0
    sheet = folder / "claims-toy-claim-sheet.png"
    assert sheet.exists() == is_found
    assert (folder / "claims-toy-claim.png").exists()


def test_finished_runs_are_kept_when_one_fails(claims, toy, run_here, tmp_path):
    main, cache = claims("harness.command").main, str(tmp_path / "c")
    with pytest.raises(RuntimeError, match="the run fails"):
        main(toy(failing=1), ["--cache", cache])
    assert calls(tmp_path) == [0, 0, 1, 1]
    assert len(list((tmp_path / "c/toy_claim").iterdir())) == 2


def test_a_second_start_runs_what_is_missing(claims, toy, run_here, tmp_path, capsys):
    main, claim = claims("harness.command").main, toy()
    options = ["--cache", str(tmp_path / "c"), "--output", str(tmp_path / "out")]
    main(claim, [*options, "--seeds", "1"])
    main(claim, [*options, "--seeds", "2"])
    assert calls(tmp_path) == [0, 0, 1, 1]
    main(claim, [*options, "--quick"])
    assert calls(tmp_path) == [0, 0, 1, 1]
    assert "1 runs, 1 of them finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "old", "new", "is_other"),
    [
        ("toy", '"""What one run does."""', '"""A run."""\n\n# Why.', False),
        ("toy", '"""Writes a line for each call."""', '"""Writes."""', False),
        ("helper", "2 * seed", "(2   *   seed)  # twice", False),
        ("helper", "2 * seed", "3 * seed", True),
        ("toy", '+ settings["width"]', '- settings["width"]', True),
    ],
)
def test_other_code_makes_finished_runs_invalid(claims, toy, tmp_path, part, old, new, is_other):
    digest, claim = claims("harness.cache").code_digest, toy()
    before = digest(claim.run)
    (file,) = (tmp_path / "trainings").glob(f"{part}_*.py")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert (digest(claim.run) != before) == is_other


def test_settings_and_data_tell_runs_apart(claims, toy, tmp_path):
    cache_of, data = claims("harness.cache").Cache, claims("harness.data")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"1234")
    claim, sources = toy(), data.Sources(tmp_path)
    cache = cache_of(tmp_path / "c", claim, sources)
    paths = {
        cache.path({"data": name, "seed": seed})
        for name in ("digits", data.FASHION_MNIST)
        for seed in range(3)
    }
    assert len(paths) == 6
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"1235")
    cache = cache_of(tmp_path / "c", claim, sources)
    assert cache.path({"data": "digits", "seed": 0}) in paths
    assert cache.path({"data": data.FASHION_MNIST, "seed": 0}) not in paths


def test_the_package_and_the_processor_tell_runs_apart(claims, toy, tmp_path, monkeypatch):
    module, claim = claims("harness.cache"), toy()
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(module.marginops, "__file__", str(package / "__init__.py"))

    def path():
        cache = module.Cache(tmp_path / "c", claim, claims("harness.data").Sources(tmp_path))
        return cache.path({"data": "digits", "seed": 0})

    paths = [path(), path()]
    (package / "sampler.py").write_text("KEEP = 0.3")
    paths.append(path())
    monkeypatch.setattr(module.recipe, "fingerprint", lambda *_: "other kernels")
    paths.append(path())
    monkeypatch.setattr(module, "processor", lambda: "another processor")
    paths.append(path())
    assert paths[0] == paths[1] and len(set(paths)) == 4


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    (tmp_path / "stalling.py").write_text(STALLING)
    (tmp_path / "toy_claim.py").write_text(COMMAND)
    start = f"import runpy; runpy.run_path({str(tmp_path / 'toy_claim.py')!r}, run_name='__main__')"
    paths = dict(PYTHONPATH=os.pathsep.join([INSTALLED, str(CLAIMS), str(tmp_path)]))
    cache = tmp_path / "cache"

    process = python(start, **paths, XDG_CACHE_HOME=str(cache), STALLS="yes")
    wait_until(lambda: not alive(process.pid) or len(list(cache.rglob("*.json"))) == 2)
    process.kill()
    process.communicate()
    kept = {file: file.stat().st_mtime_ns for file in cache.rglob("*.json")}
    assert len(kept) == 2

    process = python(start, **paths, XDG_CACHE_HOME=str(cache))
    output, log = process.communicate()
    assert process.returncode == 0, log
    assert "4 runs, 2 of them finished" in log
    assert "threads [1, 1, 1, 1]" in output
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_of_the_command_line(claims, toy, value, capsys):
    with pytest.raises(SystemExit):
        claims("harness.command").main(toy(), ["--seeds", value])
    assert "--seeds" in capsys.readouterr().err


def test_data_sets_that_are_missing(claims, tmp_path):
    data = claims("harness.data")
    sources = data.Sources(tmp_path / "none")
    assert sources.has(data.DIGITS)
    for name in (data.FASHION_MNIST, data.MNIST, data.NEWSGROUPS, data.REUTERS):
        assert not sources.has(name)
    assert data.Sources(tmp_path, texts=tmp_path).has(data.REUTERS)


def test_held_out_samples_are_training_samples_that_are_not_trained_on(claims):
    module = claims("harness.data")
    inputs, target = torch.arange(60.0).reshape(60, 1, 1, 1), torch.arange(60) % 10
    data = module.Data(inputs, target, inputs - 1000, target)
    split = module.held_out(data)
    assert len(split.test_target) == 10
    both = torch.cat([split.train_inputs, split.test_inputs]).flatten()
    assert both.sort().values.tolist() == list(range(60))
    assert torch.equal(torch.cat([split.train_target, split.test_target]), both.long() % 10)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8))
def test_intervals_contain_their_mean_and_lie_within_the_values(pairs):
    from harness.statistics import paired_difference

    first, second = np.array(pairs).T
    found = paired_difference(first, second)
    differences = second - first
    assert found.value == pytest.approx(differences.mean(), abs=1e-9)
    assert differences.min() - 1e-9 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= differences.max() + 1e-9


def test_intervals_of_few_values_are_as_wide_as_those_of_student(claims):
    from scipy.stats import t

    generator = np.random.default_rng(0)
    widths = []
    for _ in range(50):
        values = generator.normal(0, 1, 5)
        found = claims("harness.statistics").mean_interval(values)
        half = t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5)
        widths.append((found.high - found.low) / (2 * half))
    assert 0.85 < np.mean(widths) < 1.05


def test_intervals_of_many_values_are_those_of_the_normal_distribution(claims):
    statistics = claims("harness.statistics")
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = statistics.mean_interval(values)
    width = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - width, abs=0.1 * width)
    assert found.high == pytest.approx(values.mean() + width, abs=0.1 * width)


def test_ratios_and_texts(claims):
    statistics = claims("harness.statistics")
    ratio = statistics.paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert ratio.text() == "2.00 (2.00 to 2.00)"
    assert statistics.paired_ratio([1.0], [2.0]).text() == "2.00"
    assert statistics.mean_sd([0.1, 0.2, 0.3], 1, scale=100) == "20.0 ± 10.0"
    assert statistics.mean_sd([0.5]) == "0.50"
