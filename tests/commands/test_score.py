"""The score command: its selection against NumPy, what it prints, and its files."""

import json
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
from helpers.score_files import CLASSES, ROWS, WIDTH, score
from helpers.user_modules import user_modules
from marginops.commands.score import arguments

MODULE = """
import torch

def model():
    network = torch.nn.Linear(6, 4, bias=False)
    torch.nn.init.eye_(network.weight)
    return network
"""


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet")


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


def test_another_label_of_rows_without_one(files, capsys):
    files.label[:3] = -1
    files.write()
    assert files.run("--target", "label", "--select", ROWS, "--ignore-index", -1) == 0
    rows = read(files.folder / "out", "selection")["row"]
    np.testing.assert_array_equal(rows, 3 + np.argsort(files.margin[3:], kind="stable"))
    assert "  3 without a label" in capsys.readouterr().out.splitlines()


def test_the_help_names_all_statistics_and_dtypes():
    from marginops.scoring import columns, statistics

    assert arguments.STATISTICS == statistics.STATISTICS
    assert (*columns.DTYPES,) == arguments.DTYPES
