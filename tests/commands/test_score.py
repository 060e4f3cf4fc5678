"""The score command: its selection against NumPy, what it prints, its files, its progress."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import marginops
from helpers.processes import INSTALLED, PATIENCE, wait_until
from helpers.score_files import CLASSES, ROWS, WIDTH, Embeddings, score
from helpers.user_modules import user_modules
from marginops.commands.score import progress as progress_file
from marginops.commands.score.figure import draw
from marginops.commands.score.progress import Progress
from marginops.commands.score.summary import sentences

MODULE = """
import os, time, torch

def model():
    return Slow()

class Slow(torch.nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        torch.nn.init.eye_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, inputs):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        return super().forward(inputs.float())
"""


@pytest.fixture(scope="module", autouse=True)
def native_library():
    """Build or load the native library now: what it says then is not the command's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture
def files(tmp_path):
    return Embeddings(tmp_path)


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet")


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_selection_is_that_of_numpy(files, capsys):
    assert files.run("--target", "label", "--id", "id", "--select", 50) == 0
    order = np.lexsort((files.id, files.margin))[:50]
    selection = read(files.folder / "out", "selection")
    assert selection.column_names == ["id", "row", "margin", "target"]
    np.testing.assert_array_equal(selection["id"], files.id[order])
    np.testing.assert_array_equal(selection["row"], order)
    np.testing.assert_allclose(selection["margin"], files.margin[order], rtol=1e-4, atol=1e-4)
    scores = pa.concat_tables(
        pq.read_table(path) for path in sorted((files.folder / "out/scores").iterdir())
    )
    np.testing.assert_array_equal(scores["id"], files.id)
    np.testing.assert_allclose(scores["margin"], files.margin, rtol=1e-4, atol=1e-4)
    lines = capsys.readouterr().out.splitlines()
    first, last = (f"{selection['margin'][place].as_py():.5g}" for place in (0, -1))
    assert f"selected: the 50 rows with the smallest margin, from {first} to {last}" in lines
    assert f"{100 * (files.margin > 0).mean():.2f} % of them are classified correctly." in lines
    assert lines[0] == "700 rows, all of them with finite values and logits"
    output = files.folder / "out"
    assert lines[-5:] == [
        f"wrote {output}/selection.parquet",
        f"wrote {output}/margins.parquet",
        f"wrote {output}/scores/part-*.parquet (8 files)",
        f"wrote {output}/summary.json",
        f"wrote {output}/figure.png",
    ]


def test_rows_that_are_not_finite_are_counted_and_come_last(files, capsys):
    files.values[3, 1], files.values[4, 2] = np.nan, -np.inf
    lists = files.values.tolist()
    lists[9] = None
    kind = pa.list_(pa.float16())  # pyarrow reads no null in lists of a fixed size
    label = pa.array(files.label, mask=np.isin(np.arange(ROWS), [20, 21]))
    files.write(embedding=pa.array(lists, kind), label=label)
    assert files.run("--target", "label", "--select", ROWS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "700 rows",
        "  1 without values (null)",
        "  1 with a NaN among their values",
        "  1 with an infinity among their values",
        "  2 without a label",
        "Rows whose values or logits are not finite come last in every selection.",
    ]
    assert "margin of 695 rows" in lines
    rows = read(files.folder / "out", "selection")["row"].to_pylist()
    assert rows[-3:] == [3, 4, 9] and {20, 21}.isdisjoint(rows)
    assert "selected: all 698 rows that have a margin, fewer than the 700 asked for" in lines


def test_logits_beyond_the_largest_number_are_counted(files, capsys):
    values = np.zeros((ROWS, WIDTH), np.float32)
    values[7] = 3e38 * np.sign(files.weight[0])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), WIDTH)
    files.write(embedding=lists)
    assert files.run("--no-scores") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  1 with finite values, but logits that are not finite"
    assert not (files.folder / "out/scores").exists()
    assert not any("scores/" in line for line in lines)


def test_selection_per_class(files, capsys):
    files.label[:] = np.minimum(files.label, 2)  # class 3 has no rows
    files.write()
    assert files.run("--target", "label", "--select-per-class", 20, "--largest") == 0
    chosen = read(files.folder / "out", "selection_per_class")
    for label in range(3):
        rows = np.flatnonzero(files.label == label)
        largest = rows[np.argsort(-files.margin[rows], kind="stable")[:20]]
        found = chosen.filter(pa.array(chosen["target"].to_numpy() == label))["row"]
        np.testing.assert_array_equal(found, largest)
    printed = capsys.readouterr().out
    assert (
        "selected per class: 60 rows, the 20 with the largest margin of each label\n"
        "classes with fewer rows, 1 of 4: 3\n"
    ) in printed


def test_label_issues_and_class_moments(files, capsys):
    assert files.run("--target", "label", "--label-issues", 30, "--class-moments") == 0
    prediction, margin = files.logits.argmax(1), files.margin
    wrong = margin < 0
    issues = read(files.folder / "out", "label_issues")
    np.testing.assert_array_equal(issues["row"], np.argsort(margin, kind="stable")[:30])
    np.testing.assert_array_equal(issues["suggested"], prediction[issues["row"].to_numpy()])
    pairs = Counter(zip(files.label[wrong].tolist(), prediction[wrong].tolist(), strict=True))
    printed = capsys.readouterr().out
    assert (
        f"label issues: {wrong.sum():,} labelled rows are misclassified, {100 * wrong.mean():.2f} "
        "%; the 30 with the most negative margin are kept\n"
    ) in printed
    label, suggested = min(pairs, key=lambda pair: (-pairs[pair], pair))
    line = f"{pairs[label, suggested]} rows of label {label} look like class {suggested}\n"
    assert line in printed
    moments = read(files.folder / "out", "moments")
    means = [files.values[files.label == label].mean(0, dtype=np.float64) for label in range(4)]
    np.testing.assert_allclose(moments["mean"].to_pylist(), means, rtol=1e-3, atol=1e-3)
    assert "class moments: 4 classes of 6 values, mean radius " in printed


def test_the_distribution_is_that_of_the_score_that_selects(files):
    assert files.run("--target", "label", "--select", 9, "--by", "loss", "--largest") == 0
    summary = json.loads((files.folder / "out/summary.json").read_text())
    logits = torch.tensor(files.logits)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(files.label), reduction="none")
    assert summary["margins"]["by"] == summary["selection"]["by"] == "loss"
    assert summary["margins"]["mean"] == pytest.approx(loss.mean().item(), rel=1e-4)
    assert summary["selection"]["last_score"] == pytest.approx(loss.topk(9).values[-1].item(), 1e-4)


def test_the_default_score_without_labels_is_the_distance_to_the_boundary(files):
    assert files.run("--select", 5) == 0
    score_of = read(files.folder / "out", "selection")["minimal_margin"].to_numpy()
    expected = marginops.minimal_margin_score(
        torch.tensor(files.logits), torch.tensor(files.weight)
    )
    np.testing.assert_allclose(score_of, expected.sort().values[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (["--target", "label"], set()),
        ([], {"margin", "rival", "loss", "confidence", "correct", "el2n", "gradient_norm"}),
    ],
)
def test_all_statistics_are_those_that_can_be_computed(files, options, left_out):
    from marginops.scoring.statistics import STATISTICS

    assert files.run(*options, "--statistics", "all") == 0
    columns = pq.read_schema(next((files.folder / "out/scores").iterdir())).names
    assert set(columns) - {"target"} == {*STATISTICS} - left_out


def test_a_column_of_bytes(files):
    assert files.run("--target", "label", "--select", 9) == 0
    content = pa.array([row.tobytes() for row in files.values], pa.binary(2 * WIDTH))
    files.write(embedding=content)
    options = ("--target", "label", "--select", 9, "--dtype", "float16")
    assert files.run(*options, output="of_bytes") == 0
    wanted = read(files.folder / "out", "selection")
    assert read(files.folder / "of_bytes", "selection").equals(wanted)


def test_logits_and_a_model_of_the_user(files, capsys):
    with user_modules(files.folder):
        Path("own/scoring.py").write_text(MODULE)
        common = ("--column", "embedding", "--workers", 1, "--quiet", "--select", 7)
        assert score(files.data, "--logits", *common, "--output", "of_logits") == 0
        model = ("--model", "own.scoring:model")
        assert score(files.data, *model, *common, "--output", "of_model", "--no-scores") == 0
    of_logits = read(files.folder / "of_logits", "selection")
    top = np.sort(files.values.astype(np.float32), 1)
    expected = np.argsort(top[:, -1] - top[:, -2], kind="stable")[:7]
    np.testing.assert_array_equal(of_logits["row"], expected)
    # The model keeps the first four of the six values.
    top = np.sort(files.values[:, :CLASSES].astype(np.float32), 1)
    expected = np.argsort(top[:, -1] - top[:, -2], kind="stable")[:7]
    np.testing.assert_array_equal(read(files.folder / "of_model", "selection")["row"], expected)
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_named_by_a_url(files, capsys):
    output = (files.folder / "url").as_uri()
    status = score(
        *(files.data.as_uri(), "--head", files.folder / "head.pt", "--column", "embedding"),
        *("--output", output, "--workers", 1, "--select", 4),
    )
    assert status == 0
    assert (files.folder / "url/figure.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {output}/figure.png" in capsys.readouterr().out.splitlines()


def test_json_has_times_and_the_folder_has_none(files):
    report = files.folder / "report.json"
    assert files.run("--target", "label", "--select", 3, "--json", report) == 0
    written = json.loads(report.read_text())
    summary = json.loads((files.folder / "out/summary.json").read_text())
    assert written["summary"] == summary
    assert written["scored_rows"] == ROWS == summary["rows"]["rows"]
    assert written["read_bytes"] == pytest.approx(ROWS * (2 * WIDTH + 8), rel=0.05)
    bytes_per_row = written["bytes_per_second"] / written["rows_per_second"]
    assert bytes_per_row == pytest.approx(written["read_bytes"] / ROWS, rel=0.05)
    assert written["seconds"] > 0
    assert "second" not in (files.folder / "out/summary.json").read_text()


def test_the_same_command_again_scores_nothing_and_changes_no_byte(files, capsys):
    options = ("--target", "label", "--select", 9)
    assert files.run(*options) == 0
    first, before = capsys.readouterr(), digests(files.folder / "out")
    report = files.folder / "report.json"
    assert files.run(*options, "--json", report) == 0
    second = capsys.readouterr()
    assert second.err == "resumed: 700 of 700 rows are scored already\n" and first.err == ""
    assert digests(files.folder / "out") == before
    assert json.loads(report.read_text())["scored_rows"] == 0
    assert "rows/s" in first.out and "rows/s" not in second.out
    told = [line for line in first.out.splitlines() if "rows/s" not in line and line]
    assert [line for line in second.out.splitlines() if line][:-1] == told


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(files):
    options = ("--target", "label", "--id", "id", "--select", 9, "--label-issues", 5)
    assert files.run(*options) == 0
    assert files.run(*options, "--workers", 2, output="two") == 0
    assert digests(files.folder / "two") == digests(files.folder / "out")


def start(files, output, *options, seconds, launcher=()):
    """Start a process that runs the command with a slow model, one batch a task."""
    (files.folder / "slow.py").write_text(MODULE)
    arguments = [*launcher, "-m", "marginops", *slow_run(files, output), *options]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=files.folder,
        env=os.environ | {"PYTHONPATH": INSTALLED, "SECONDS_A_BATCH": str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow_run(files, output):
    return [
        *("score", files.data, "--model", "slow:model", "--column", "embedding"),
        *("--target", "label", "--select", 20, "--task-rows", 100, "--output", output),
    ]


@pytest.fixture
def finish_here(files, monkeypatch):
    """Runs the same command in this process, in which the model is fast."""
    monkeypatch.chdir(files.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(output):
        return score(*slow_run(files, output)[1:], "--workers", 1)

    yield run
    sys.modules.pop("slow", None)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on(files, finish_here, capsys, workers):
    process = start(files, "out", "--workers", workers, "--quiet", seconds=0.5)
    wait_until(lambda: (files.folder / "out/done/000001.json").exists())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert error == (
        "marginops score: interrupted; finished tasks stay, and the same command goes on\n"
    )
    assert not (files.folder / "out/summary.json").exists()
    assert finish_here("out") == 0
    error = capsys.readouterr().err
    assert re.fullmatch("resumed: [2-6]00 of 700 rows are scored already\n", error), error
    assert finish_here("whole") == 0
    assert digests(files.folder / "out") == digests(files.folder / "whole")


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line(files):
    psutil = pytest.importorskip("psutil")
    process = start(files, "out", "--workers", 2, "--quiet", seconds=0.5)
    wait_until(lambda: (files.folder / "out/done/000001.json").exists())
    descendants = psutil.Process(process.pid).children(recursive=True)
    next(child for child in descendants if not child.children()).kill()
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch(
        r"marginops score: --workers: expected 2 processes that work, got one that was ended by "
        r"SIGKILL in task \d .*/[ab].parquet, row group \d.*\n",
        error,
    ), error


@pytest.mark.slow
def test_processes_of_torchrun_tell_the_results_once(files, finish_here):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    process = start(files, "out", seconds=0.05, launcher=launcher)
    printed, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert printed.count("selected: the 20 rows with the smallest margin") == 1
    assert printed.count("wrote out/figure.png") == 1
    assert "process 0 of 2: 400 rows in " in printed
    assert finish_here("alone") == 0
    assert digests(files.folder / "out") == digests(files.folder / "alone")


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_file, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.monotonic)
    return clock


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(clock, capsys):
    progress = Progress(quiet=False)
    progress.start(4_000_000, 1_000_000, 3_000_000)
    clock.now += 4  # Workers start.
    for _ in range(25):
        clock.now += 1
        progress(100_000, 25_600_000)
    progress.close()
    clock.now += 100
    assert capsys.readouterr().err.splitlines() == [
        "resumed: 1,000,000 of 4,000,000 rows are scored already",
        "2.10M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:19 left",
        "3.10M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:09 left",
    ]
    assert (progress.rows, progress.bytes, progress.seconds) == (2_500_000, 640_000_000, 29)
    assert progress.rates == (100_000, 25_600_000)


def test_progress_on_a_terminal_is_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(quiet=False)
    progress.start(4_000_000, 0, 4_000_000)
    clock.now += 4
    for _ in range(10):
        clock.now += 1
        progress(100_000, 25_600_000)
    progress.close()
    bars = terminal.getvalue().split("\r")
    assert re.fullmatch(
        r" 25%\|.*\| 1.00M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:30 left\s*", bars[-1]
    ), bars[-1]


def test_progress_of_one_of_several_processes_counts_its_share(clock, capsys):
    progress = Progress(quiet=False)
    progress.start(1000, 100, 350)
    progress(50, 1)
    assert progress.rates is None
    clock.now += 10
    progress(200, 1)
    assert capsys.readouterr().err.splitlines()[1].startswith("350 of 450 rows, 20.0 rows/s")


def test_quiet_progress_counts_and_shows_nothing(clock, capsys):
    progress = Progress(quiet=True)
    progress.start(1000, 500, 500)
    clock.now += 20
    progress(500, 1000)
    progress.close()
    assert capsys.readouterr().err == "" and progress.rows == 500


def summary_of(**parts):
    counts = dict.fromkeys(("missing", "nan", "infinite", "overflow", "unlabelled"), 0)
    return {"rows": {"rows": 400, **counts}, **parts}


def selection_of(**changes):
    return {
        **{"by": "loss", "largest": True, "k": 10, "rows": 400, "selected": 10},
        **{"first_score": 4.5, "last_score": 2.25},
        **changes,
    }


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (
            summary_of(selection=selection_of()),
            "selected: the 10 rows with the largest loss, from 4.5 to 2.25",
        ),
        (
            summary_of(selection=selection_of(k=1000, selected=400)),
            "selected: all 400 rows that have a loss, fewer than the 1,000 asked for",
        ),
        (
            summary_of(selection=selection_of(last_score=None)),
            "selected: the 10 rows with the largest loss, from 4.5 to not finite",
        ),
        (
            summary_of(label_issues={"k": 3, "error_rate": None, "most_confused": []}),
            "label issues: no row has a label and finite logits",
        ),
        (
            summary_of(
                moments={"classes": 9, "features": 1024, "mean_radius": None, "empty_classes": 9}
            ),
            "class moments: 9 classes of 1,024 values, mean radius not finite; "
            "classes without rows: 9",
        ),
    ],
)
def test_sentences(summary, text):
    assert list(sentences(summary))[1:] == [text]


def distribution_of(values):
    """The table and the summary of a distribution, as a run leaves them."""
    edges = np.unique(np.concatenate([np.linspace(values.min(), values.max(), 400), [0]]))
    edges[-1] += 1e-9
    counts, _ = np.histogram(values, edges)
    bins = pa.table({"lower": edges[:-1], "upper": edges[1:], "count": counts})
    return bins.filter(pa.array(counts > 0)), {"by": "margin", "count": len(values)}


def test_the_figure_shows_the_distribution_and_the_selection():
    values = np.random.default_rng(0).standard_normal(20_000)
    bins, margins = distribution_of(values)
    threshold = np.sort(values)[499]
    selection = selection_of(by="margin", largest=False, last_score=threshold, selected=500)
    figure = draw(summary_of(margins=margins, selection=selection), bins, "subtitle")
    (axes,) = figure.axes
    shares, edges, _ = axes.patches[0].get_data()
    expected, _ = np.histogram(values, edges)
    np.testing.assert_allclose(shares, expected / len(values), atol=0.002)
    assert shares.sum() > 0.99
    vertical = [line.get_xdata()[0] for line in axes.lines]
    assert vertical == [0, threshold]
    (label,) = axes.get_legend().get_texts()
    assert label.get_text() == f"500 selected rows: up to {threshold:.4g}"
    assert "subtitle" in figure.get_suptitle()


def test_the_figure_shows_no_threshold_of_another_score():
    bins, margins = distribution_of(np.linspace(1, 2, 500))
    figure = draw(summary_of(margins=margins, selection=selection_of()), bins, "")
    assert not figure.axes[0].lines and figure.axes[0].get_legend() is None


def test_the_figure_shows_confused_classes():
    bins, margins = distribution_of(np.linspace(1, 2, 500))
    pairs = [{"label": 1, "prediction": 3, "count": 17}, {"label": 0, "prediction": 2, "count": 4}]
    issues = {"most_confused": pairs, "misclassified": 21}
    figure = draw(summary_of(margins=margins, label_issues=issues), bins, "")
    axes = figure.axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 → 3", "0 → 2"]
    assert [bar.get_width() for bar in axes.patches] == [17, 4]


@pytest.mark.parametrize("values", [np.zeros(5), np.full(5, 1e-30), np.array([])])
def test_the_figure_of_scores_that_do_not_vary(values):
    if len(values):
        edges = [values[0], values[0] + 1e-38]
        bins = pa.table({"lower": edges[:1], "upper": edges[1:], "count": [len(values)]})
    else:
        bins = pa.table({"lower": values, "upper": values, "count": pa.array([], pa.int64())})
    summary = summary_of(margins={"by": "margin", "count": len(values)})
    draw(summary, bins, "").savefig(io.BytesIO())
