import os
import shutil

import pyarrow.parquet as pq
import pytest

from helpers.small_runs import (
    Concatenation,
    CrashingFileSystem,
    SmallScorer,
    crashing_disk,
    crashing_memory,
    digests,
    json_of,
    run,
    write_rows,
    write_task,
)
from marginops.scoring import DataError, OutputError, storage
from marginops.scoring.description import describe_run
from marginops.scoring.finish import finish
from marginops.scoring.folder import RunFolder
from marginops.scoring.plan import make_plan


@pytest.fixture
def plan(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    last = write_rows(data / "a.parquet", [4, 5])
    write_rows(data / "b.parquet", [2, 2, 2], last)
    return make_plan(data, SmallScorer(), task_rows=4)


@pytest.fixture
def small_plan(plan):
    return make_plan(plan.files[0].path, SmallScorer(), task_rows=4)


def opened(location, plan):
    return RunFolder.open(location, describe_run(SmallScorer(), plan, [Concatenation()]))


def test_results_are_the_states_in_the_order_of_the_tasks(plan, tmp_path):
    summary = run(tmp_path / "out", plan)
    assert pq.read_table(tmp_path / "out/first_rows.parquet").to_pydict() == {
        "first_row": [0, 4, 9, 13]
    }
    assert summary == json_of(tmp_path / "out", "summary.json")
    assert summary == {
        "files": 2,
        "tasks": 4,
        "rows": {"rows": 15},
        "statistics": ["margin"],
        "first_rows": {"tasks": 4, "mean": 6.5},
    }
    assert set(digests(tmp_path / "out")) == {
        "run.json",
        "summary.json",
        "first_rows.parquet",
        *(f"scores/part-00000{task}.parquet" for task in range(4)),
        *(f"states/first_rows/00000{task}.arrow" for task in range(4)),
        *(f"done/00000{task}.json" for task in range(4)),
    }


def test_scores_are_those_of_all_rows_in_order(plan, tmp_path):
    run(tmp_path / "out", plan)
    parts = sorted((tmp_path / "out/scores").iterdir())
    tables = [pq.read_table(part) for part in parts]
    assert [row for table in tables for row in table["id"].to_pylist()] == [*range(15)]


def test_order_of_tasks_does_not_matter(plan, tmp_path):
    run(tmp_path / "first", plan)
    folder = opened(tmp_path / "second", plan)
    for task in reversed(plan.tasks):
        write_task(folder, task, batch=5)
    finish(folder, plan, [Concatenation()])
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_twice_is_as_once(plan, tmp_path):
    reduction = Concatenation()
    summary = run(tmp_path / "out", plan)
    before = digests(tmp_path / "out")
    folder = opened(tmp_path / "out", plan)
    assert finish(folder, plan, [reduction]) == summary
    assert digests(tmp_path / "out") == before
    assert reduction.rows == []


def test_numbers_that_json_lacks_are_null(tmp_path):
    write_rows(tmp_path / "empty.parquet", [0])
    plan = make_plan(tmp_path / "empty.parquet", SmallScorer())
    assert run(tmp_path / "out", plan)["first_rows"] == {"tasks": 0, "mean": None}
    assert pq.read_table(tmp_path / "out/first_rows.parquet").num_rows == 0


def test_unfinished_tasks(plan, tmp_path):
    folder = opened(tmp_path / "out", plan)
    write_task(folder, plan.tasks[2])
    with pytest.raises(DataError, match=r"expected 4 finished tasks, got 1; run the same command"):
        finish(folder, plan, [Concatenation()])
    assert not (tmp_path / "out/summary.json").exists()


def test_damaged_state(plan, tmp_path):
    run(tmp_path / "out", plan)
    state = tmp_path / "out/states/first_rows/000001.arrow"
    state.write_bytes(bytes(state.stat().st_size))
    with pytest.raises(DataError, match=r"000001.arrow: expected .* delete the file and run"):
        run(tmp_path / "out", plan)
    state.unlink()
    run(tmp_path / "out", plan)
    run(tmp_path / "other", plan)
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def test_left_overs_go(plan, tmp_path):
    opened(tmp_path / "out", plan)
    left = [tmp_path / "out/.marginops-00", tmp_path / "out/scores/.marginops-ff"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / "out/figure.png").write_bytes(b"kept")
    run(tmp_path / "out", plan)
    assert not any(path.exists() for path in left)
    assert (tmp_path / "out/figure.png").read_bytes() == b"kept"


def test_another_process_that_finishes_takes_temporary_files(plan, tmp_path):
    run(tmp_path / "out", plan)
    before = digests(tmp_path / "out")
    folder = opened(tmp_path / "out", plan)
    with folder.storage.open_output("first_rows.parquet") as file:
        file.write((tmp_path / "out/first_rows.parquet").read_bytes())
        finish(folder, plan, [Concatenation()])
    assert digests(tmp_path / "out") == before
    with (
        pytest.raises(OutputError, match=r"other\.parquet"),
        folder.storage.open_output("other.parquet"),
    ):
        finish(folder, plan, [Concatenation()])


def test_crash_after_any_operation_on_a_disk(small_plan, tmp_path, monkeypatch):
    with crashing_disk(monkeypatch, None) as crash:
        run(tmp_path / "whole", small_plan)
    expected = digests(tmp_path / "whole")
    assert crash.operations > 30
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    halves = 0
    for last in range(crash.operations):
        out = tmp_path / f"out{last}"
        with crashing_disk(monkeypatch, last):
            # The last operations are those whose failure changes no file.
            try:
                run(out, small_plan)
            except OutputError as error:
                assert "crashed" in str(error)
                halves += 1
        run(out, small_plan)
        assert digests(out) == expected, last
        shutil.rmtree(out)
    assert halves > 25


def test_crash_after_any_operation_where_half_files_are_visible(small_plan):
    CrashingFileSystem.store.clear()
    with crashing_memory(None) as crash:
        run("crashing://whole", small_plan)
    expected = digests("crashing://whole")
    assert crash.operations > 15
    for last in range(crash.operations):
        with crashing_memory(last), pytest.raises(OutputError, match="crashed"):
            run(f"crashing://out{last}", small_plan)
        run(f"crashing://out{last}", small_plan)
        assert digests(f"crashing://out{last}") == expected, last


def test_all_file_systems_get_the_same_bytes(plan, tmp_path):
    run(tmp_path / "out", plan)
    run(f"file://{tmp_path}/with%20uri", plan)
    run("memory://same_bytes", plan)
    assert os.path.isdir(tmp_path / "with uri")
    assert digests(tmp_path / "out") == digests(tmp_path / "with uri")
    assert digests(tmp_path / "out") == digests("memory://same_bytes")
    assert storage.resolve("memory://same_bytes")[0].type_name == "py::fsspec+memory"


def test_memory_is_bounded(tmp_path, monkeypatch):
    """States are read ahead as far as the limit goes, and not further."""
    write_rows(tmp_path / "a.parquet", [1] * 40)
    plan = make_plan(tmp_path / "a.parquet", SmallScorer(), task_rows=1)
    run(tmp_path / "out", plan)
    folder = opened(tmp_path / "out", plan)
    size = os.path.getsize(tmp_path / "out/states/first_rows/000000.arrow")
    for limit, most in ((0, 1), (4 * size, 4), (1000 * size, 16)):
        monkeypatch.setattr("marginops.scoring.folder._AHEAD_BYTES", limit)
        read = []
        monkeypatch.setattr(
            RunFolder, "state", lambda self, task, name, read=read: read.append(task.index)
        )
        for merged, _ in enumerate(folder.states(plan.tasks, "first_rows")):
            assert len(read) <= merged + most + 1
        assert len(read) == 40
