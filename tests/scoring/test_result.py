"""read_result: what a run found, and the ways of its kept rows into training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from marginops.scoring import (
    DataError,
    Margins,
    Moments,
    Scorer,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
    read_result,
    score_files,
)
from marginops.training import MarginSampler, TrainingDynamics, WeightedSampler

ROWS, CLASSES, K = 600, 5, 40
FILE_ROWS = (350, 250)


class Data:
    """Logits, labels and ids in two files. The ids are integers in another order."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(4)
        self.logits = random.standard_normal((ROWS, CLASSES)).astype(np.float32)
        self.labels = random.integers(CLASSES, size=ROWS)
        self.ids = random.permutation(ROWS)
        self.files = []
        own = self.logits[np.arange(ROWS), self.labels]
        others = self.logits.copy()
        others[np.arange(ROWS), self.labels] = -np.inf
        self.margin = own - others.max(1)
        self.hardest = np.lexsort((self.ids, self.margin))[:K]
        first = 0
        for number, rows in enumerate(FILE_ROWS):
            part = slice(first, first + rows)
            table = pa.table(
                {
                    "logits": pa.FixedSizeListArray.from_arrays(
                        pa.array(self.logits[part].reshape(-1)), CLASSES
                    ),
                    "label": self.labels[part],
                    "number": self.ids[part],
                    "name": pa.array(
                        [f"sample {number}" for number in self.ids[part]], pa.string()
                    ),
                }
            )
            self.files.append(folder / f"{number}.parquet")
            pq.write_table(table, self.files[-1], row_group_size=100)
            first += rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("files"))


def run(
    data: Data, output: Any, *reductions: Any, id: str | None = "number", **options: Any
) -> Any:
    scorer = Scorer(column="logits", target="label", id=id)
    options = {"workers": 1, "task_rows": 100} | options
    score_files(data.files, scorer, output, reductions=reductions, **options)
    return output


@pytest.fixture(scope="module")
def finished(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "scores"
    return run(data, folder, Smallest(K), SuspiciousLabels(7), Margins(), Moments())


def test_the_kept_rows_are_those_of_the_smallest_margins(data: Data, finished: Path) -> None:
    result = read_result(finished)
    assert result.num_rows == ROWS
    assert result.summary["selection"]["selected"] == K
    assert result.indices.dtype == torch.int64
    assert result.indices.tolist() == data.hardest.tolist()
    assert result.selection["id"].to_pylist() == data.ids[data.hardest].tolist()
    np.testing.assert_allclose(result.selection["margin"], data.margin[data.hardest], rtol=1e-6)
    assert read_result(str(finished)).indices.equal(result.indices)
    assert repr(result) == f"ScoringResult({str(finished)!r}, num_rows=600)"


def test_ids_can_be_the_indices_of_the_data_set(data: Data, finished: Path) -> None:
    result = read_result(finished, index="id")
    assert result.indices.tolist() == data.ids[data.hardest].tolist()
    expected = torch.zeros(ROWS)
    expected[torch.from_numpy(data.ids[data.hardest])] = 1
    assert torch.equal(result.weights(), expected)


def test_weights(data: Data, finished: Path) -> None:
    result = read_result(finished)
    weights = result.weights()
    assert weights.dtype == torch.float32 and weights.sum() == K
    assert set(weights.nonzero().squeeze(1).tolist()) == set(data.hardest.tolist())
    assert torch.equal(result.weights(ROWS + 5), torch.cat([weights, torch.zeros(5)]))
    sampler = WeightedSampler(weights)
    sampler.set_epoch(2)
    assert sorted(sampler) == sorted(data.hardest.tolist())
    last = max(data.hardest)
    with pytest.raises(ValueError, match=rf"^num_samples: expected .* to {last}, got {last} samp"):
        result.weights(int(last))
    with pytest.raises(ValueError, match=r"^num_samples: expected"):
        result.weights(0)


def test_the_scores_come_in_the_order_of_the_rows(data: Data, finished: Path) -> None:
    scores = read_result(finished).scores()
    table = scores.to_table()
    assert table["id"].to_pylist() == data.ids.tolist()
    assert table["target"].to_pylist() == data.labels.tolist()
    np.testing.assert_allclose(table["margin"], data.margin, rtol=1e-6)
    batches = list(scores.to_batches(columns=["id"], batch_size=64))
    assert pa.Table.from_batches(batches)["id"].to_pylist() == data.ids.tolist()


def test_other_tables(data: Data, finished: Path) -> None:
    result = read_result(finished)
    issues = result.label_issues
    wrong = data.margin < 0
    assert issues["row"].to_pylist() == data.hardest[:7].tolist() and wrong[data.hardest[:7]].all()
    assert sum(result.margins["count"].to_pylist()) == ROWS
    assert sum(result.moments["count"].to_pylist()) == ROWS


def test_a_sampler_draws_from_the_kept_rows(data: Data, finished: Path) -> None:
    samples = TensorDataset(
        torch.arange(ROWS), torch.from_numpy(data.logits), torch.from_numpy(data.labels)
    )
    dynamics = TrainingDynamics(ROWS)
    sampler = MarginSampler(dynamics, subset=read_result(finished).indices)
    visited = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for indices, logits, target in DataLoader(samples, 8, sampler=sampler):
            dynamics.update(indices, logits, target)
            visited += indices.tolist()
    assert len(visited) == 4 * 0.4 * K and set(visited) == set(data.hardest.tolist())


def test_torch_takes_a_subset(data: Data, finished: Path) -> None:
    subset = Subset(TensorDataset(torch.from_numpy(data.logits)), read_result(finished).indices)
    assert len(subset) == K
    (batch,) = next(iter(DataLoader(subset, batch_size=K)))
    assert torch.equal(batch, torch.from_numpy(data.logits[data.hardest]))


def test_hugging_face_takes_a_subset(data: Data, finished: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in data.files]
    dataset = datasets.load_dataset("parquet", data_files=files, cache_dir=tmp_path, split="train")
    subset = dataset.select(read_result(finished).indices)
    assert subset["number"][:] == data.ids[data.hardest].tolist()


def test_ids_may_be_strings(data: Data, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "scores", Smallest(K), id="name")
    result = read_result(folder)
    assert sorted(result.indices.tolist()) == sorted(data.hardest.tolist())
    names = [f"sample {data.ids[row]}" for row in result.indices]
    assert result.selection["id"].to_pylist() == names
    with pytest.raises(DataError, match=r'^index: expected integers as ids for "id", got .*string'):
        _ = read_result(folder, index="id").indices


def test_ids_that_are_no_indices_of_a_tensor_are_named(data: Data, tmp_path: Path) -> None:
    table = pq.read_table(data.files[0]).slice(0, 9)
    ids = pa.array([2**63 + row for row in range(9)], pa.uint64())
    pq.write_table(table.set_column(2, "number", ids), tmp_path / "large.parquet")
    scorer = Scorer(column="logits", target="label", id="number")
    options = {"reductions": [Smallest(3)], "workers": 1}
    score_files(tmp_path / "large.parquet", scorer, tmp_path / "scores", **options)
    assert len(read_result(tmp_path / "scores").indices) == 3
    with pytest.raises(DataError, match=r'^index: expected ids below 2\*\*63 for "id", got an err'):
        _ = read_result(tmp_path / "scores", index="id").indices


def test_a_run_without_ids(data: Data, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "scores", Smallest(K), id=None)
    assert set(read_result(folder).indices.tolist()) == set(data.hardest.tolist())
    with pytest.raises(DataError, match=r'^index: expected a run with ids for "id", got one wit'):
        _ = read_result(folder, index="id").indices


def test_a_selection_per_class(data: Data, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "scores", SmallestPerClass(6))
    expected = [
        row
        for label in range(CLASSES)
        for row in np.lexsort((data.ids, data.margin))
        if data.labels[row] == label
    ]
    counts = np.bincount(data.labels)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    expected = [row for start in starts for row in expected[start : start + 6]]
    assert read_result(folder).indices.tolist() == expected


def test_two_selections_are_named(data: Data, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "scores", Smallest(K), SmallestPerClass(6))
    with pytest.raises(DataError, match=r"^selection: .*; call read_result\(folder, selection='se"):
        _ = read_result(folder).indices
    assert len(read_result(folder, selection="selection").indices) == K
    assert len(read_result(folder, selection="selection_per_class").indices) == 6 * CLASSES


def test_a_location_may_be_a_url(data: Data) -> None:
    pytest.importorskip("fsspec")
    folder = run(data, "memory://scores-of-test-result", Smallest(K))
    result = read_result(folder)
    assert result.indices.tolist() == data.hardest.tolist()
    assert result.scores().to_table()["id"].to_pylist() == data.ids.tolist()


def test_what_a_run_did_not_find_is_named(data: Data, tmp_path: Path) -> None:
    result = read_result(run(data, tmp_path / "scores", scores=False))
    for name, option in {
        "selection": r"--select K or Smallest\(k\)",
        "label_issues": "--label-issues K or SuspiciousLabels",
        "margins": "Margins",
        "moments": "--class-moments or Moments",
    }.items():
        with pytest.raises(DataError, match=f"^{name}: expected a run with {option}"):
            getattr(result, name)
    with pytest.raises(
        DataError, match=r"^scores: expected a run with scores of all rows, got one"
    ):
        result.scores()


def test_wrong_arguments_are_named(finished: Path) -> None:
    with pytest.raises(ValueError, match=r'^index: expected "row" or "id", got \'name\'$'):
        read_result(finished, index="name")
    with pytest.raises(ValueError, match=r'^selection: expected "selection" or "selection_per_cl'):
        read_result(finished, selection="label_issues")


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def write(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(value))


DAMAGE = {
    "no folder": (
        no_folder,
        r"^folder: expected the output of marginops score, got .* without run",
    ),
    "no run": (remove("run.json"), r"^folder: expected the output of marginops score, got .*"),
    "cut run": (cut("run.json"), r"run\.json: expected .* got an error: .*; run in a new folder$"),
    "no end": (
        remove("summary.json"),
        r"^folder: expected a finished run, got .* with 7 finished tasks and no summary.json; run",
    ),
    "cut summary": (cut("summary.json"), r"summary\.json: expected .*; delete it and run the same"),
    "other summary": (write("summary.json", [1]), r"summary\.json: expected .* list instead of an"),
    "empty summary": (write("summary.json", {}), r"summary\.json: expected .* no files; delete it"),
    "no selection": (remove("selection.parquet"), r"selection\.parquet: expected a file of a fin"),
    "cut selection": (cut("selection.parquet"), r"selection\.parquet: expected a file of a finish"),
    "no part": (
        remove("scores/part-000002.parquet"),
        r"^scores: expected the files of 7 tasks, got 6; .*part-000002.parquet is missing or has",
    ),
    "cut part": (cut("scores/part-000000.parquet"), r"^scores: expected .*part-000000.parquet is "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named(data: Data, tmp_path: Path, case: str) -> None:
    folder = run(data, tmp_path / "scores", Smallest(K))
    change, message = DAMAGE[case]
    change(folder)
    with pytest.raises(DataError, match=message):
        result = read_result(folder)
        _ = result.indices
        result.scores()


@pytest.mark.parametrize("case", [case for case in DAMAGE if case not in ("no run", "cut run")])
def test_what_an_error_says_repairs_the_folder(data: Data, tmp_path: Path, case: str) -> None:
    folder = run(data, tmp_path / "scores", Smallest(K))
    DAMAGE[case][0](folder)
    if "summary" in case or "selection" in case:
        name = "summary.json" if "summary" in case else "selection.parquet"
        (folder / name).unlink(missing_ok=True)
    result = read_result(run(data, folder, Smallest(K)))
    assert result.indices.tolist() == data.hardest.tolist()
    assert result.scores().count_rows() == ROWS
