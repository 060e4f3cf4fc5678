import errno
import gc
import json
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.processes import python
from helpers.small_runs import (
    Concatenation,
    SmallScorer,
    digests,
    json_of,
    run,
    write_rows,
    write_task,
)
from marginops.scoring import DataError, OutputError, outputs
from marginops.scoring.description import describe_run, differences
from marginops.scoring.folder import RunFolder
from marginops.scoring.plan import Task, make_plan
from marginops.scoring.storage import Storage


@pytest.fixture
def plan(tmp_path):
    write_rows(tmp_path / "a.parquet", [4, 5])
    write_rows(tmp_path / "b.parquet", [6], 9)
    return make_plan([tmp_path / "a.parquet", tmp_path / "b.parquet"], SmallScorer(), task_rows=4)


@pytest.fixture
def description(plan):
    return describe_run(SmallScorer(), plan, [Concatenation()])


def test_a_new_folder_says_what_the_run_depends_on(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "new/out", description)
    assert json_of(tmp_path / "new/out", "run.json") == description == folder.description
    assert description["rows"] == 15 and description["reductions"] == {"first_rows": {}}
    assert {"format", "marginops", "torch", "pyarrow", "scorer", "task_rows"} < {*description}
    assert str(tmp_path) not in json.dumps(description)
    assert folder.finished() == set()
    assert RunFolder.open(tmp_path / "new/out", description).finished() == set()


def test_a_folder_goes_to_other_processes(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    write_task(pickle.loads(pickle.dumps(folder)), plan.tasks[1])
    assert folder.finished() == {1}
    assert folder.state(plan.tasks[1], "first_rows")["first_row"].to_pylist() == [4]


CHANGES = {
    "torch": (lambda d: {**d, "torch": "9.0"}, r"torch: \S+ there and 9\.0 here"),
    "column": (
        lambda d: {**d, "scorer": {**d["scorer"], "column": "logits"}},
        r"scorer column: row there and logits here",
    ),
    "head": (
        lambda d: {**d, "scorer": {**d["scorer"], "head": {"sha256": "b" * 64}}},
        r"scorer head sha256: aaaaaaaaaaaa\.\.\. there and bbbbbbbbbbbb\.\.\. here",
    ),
    "statistics": (
        lambda d: {**d, "scorer": {**d["scorer"], "statistics": ["margin", "loss"]}},
        r"scorer statistics: margin there and margin, loss here",
    ),
    "reductions": (
        lambda d: {**d, "reductions": {"selection": {"k": 3}}},
        r"reductions first_rows: only there; reductions selection: only here",
    ),
    "more": (
        lambda d: {**d, "rows": 9, "files": [*d["files"], {**d["files"][0], "name": "c.parquet"}]},
        r"\(files: 1 more, such as c\.parquet\)",
    ),
    "fewer": (lambda d: {**d, "files": d["files"][1:]}, r"\(files: 1 fewer, such as a\.parquet\)"),
    "changed": (
        lambda d: {**d, "files": [d["files"][0], {**d["files"][1], "bytes": 1}]},
        r"\(files: 1 changed, such as b\.parquet\)",
    ),
    "order": (lambda d: {**d, "files": d["files"][::-1]}, r"\(files: another order\)"),
    "processor": (
        lambda d: {**d, "processor": "ALTIVEC"},
        r"\(processor: [A-Z][A-Z0-9 ]+ there and ALTIVEC here\)",
    ),
    "task_rows": (lambda d: {**d, "task_rows": 5}, r"\(task_rows: 4 there and 5 here\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run(tmp_path, plan, description, name):
    change, message = CHANGES[name]
    RunFolder.open(tmp_path / "out", description)
    before = digests(tmp_path / "out")
    expected = (
        f"^output: expected a new folder or the one of this run, got {tmp_path}/out of another "
        r"run \(.*\); choose another folder, or delete this one if you do not need it$"
    )
    with pytest.raises(DataError, match=expected) as caught:
        RunFolder.open(tmp_path / "out", change(description))
    assert re.search(message, str(caught.value)), caught.value
    assert digests(tmp_path / "out") == before


def test_the_order_of_keys_does_not_matter(tmp_path, description):
    RunFolder.open(tmp_path / "out", description)
    RunFolder.open(tmp_path / "out", dict(reversed(description.items())))
    assert differences(description, description) == []


@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_folder_of_something_else(tmp_path, description, root):
    out = tmp_path / "out" if root == "local" else f"memory://{tmp_path.name}/out"
    Storage(out).write("photos/cat.jpg", b"cat")
    Storage(out).write("notes.txt", b"mine")
    with pytest.raises(
        DataError,
        match=r"expected a new or empty folder, got .*out with 2 files, such as notes.txt",
    ):
        RunFolder.open(out, description)
    assert set(digests(out)) == {"photos/cat.jpg", "notes.txt"}


def test_a_file_in_place_of_the_folder(tmp_path, description):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"expected a folder, got the file .*out; choose"):
        RunFolder.open(tmp_path / "out", description)
    with pytest.raises(OutputError, match=r"expected a folder that can be read and written, got "):
        RunFolder.open(tmp_path / "out/inner", description)
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_left_overs_alone_are_no_other_files(tmp_path, description):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.marginops-0123").write_bytes(b"half")
    assert RunFolder.open(tmp_path / "out", description).finished() == set()


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "mar', b"[1]\n"])
def test_a_damaged_description(tmp_path, plan, description, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_bytes(content)
    assert RunFolder.open(out, description).description == description
    run(out, plan)
    (out / "run.json").write_bytes(content)
    with pytest.raises(DataError, match=r"of another run \(run\.json is damaged\)"):
        RunFolder.open(out, description)


OPEN = """
import json, sys, time
from marginops.scoring import DataError
from marginops.scoring.folder import RunFolder
from marginops.scoring.storage import Storage
out, name, *descriptions = sys.argv[1:]
ready = Storage(out)
ready.write("ready" + name, b"")
while len(ready.sizes()) < 2:
    time.sleep(0.001)
for number in range(20):
    for kind, description in enumerate(descriptions):
        try:
            RunFolder.open(f"{out}/{number}-{kind}", json.loads(description))
            print(number, kind)
        except DataError:
            pass
"""


def test_two_processes_at_once(tmp_path, description):
    """Of the same run both may go on, and of two runs one."""
    same, mine, other = (json.dumps({"run": name}) for name in ("same", "mine", "other"))
    processes = [python(OPEN, tmp_path, "a", same, mine), python(OPEN, tmp_path, "b", same, other)]
    opened = [(*process.communicate(), process.returncode) for process in processes]
    assert all(code == 0 for *_, code in opened), opened
    lines = [set(text.splitlines()) for text, *_ in opened]
    for number in range(20):
        assert all(f"{number} 0" in found for found in lines)
        assert sum(f"{number} 1" in found for found in lines) == 1


def test_what_a_finished_task_leaves(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    write_task(folder, plan.tasks[1])
    table = pq.read_table(tmp_path / "out/scores/part-000001.parquet")
    assert table.to_pydict() == {"id": [4, 5, 6, 7, 8], "margin": [4, 5, 6, 7, 8]}
    assert table.schema == pa.schema({"id": pa.int64(), "margin": pa.float32()})
    names = ["scores/part-000001.parquet", "states/first_rows/000001.arrow"]
    assert folder.markers() == {
        1: {
            "task": 1,
            "counts": {"rows": 5},
            "files": {name: (tmp_path / "out" / name).stat().st_size for name in names},
        }
    }


@pytest.mark.parametrize("name", ["scores/part-000000.parquet", "states/first_rows/000000.arrow"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "empty"])
def test_a_task_with_damaged_files_is_not_finished(tmp_path, plan, description, name, damage):
    run(tmp_path / "out", plan)
    before = digests(tmp_path / "out")
    path = tmp_path / "out" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "shorter" else b"")
    assert RunFolder.open(tmp_path / "out", description).finished() == {1, 2}
    run(tmp_path / "out", plan)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"[]", b'{"task": 0}', b'{"task": 7, "counts": {}, "files": {}}']
)
def test_a_damaged_marker_is_none(tmp_path, plan, description, content):
    run(tmp_path / "out", plan)
    before = digests(tmp_path / "out")
    (tmp_path / "out/done/000000.json").write_bytes(content)
    (tmp_path / "out/done/notes.txt").write_bytes(content)
    assert RunFolder.open(tmp_path / "out", description).finished() == {1, 2}
    (tmp_path / "out/done/notes.txt").unlink()
    run(tmp_path / "out", plan)
    assert digests(tmp_path / "out") == before


def test_a_block_that_fails_leaves_the_task_unfinished(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    task = plan.tasks[0]
    batch = pa.record_batch({"margin": np.zeros(3, np.float32)})
    with pytest.raises(FileNotFoundError, match=r"^data$"), folder.open_task(task) as writer:
        writer.write(batch)
        raise FileNotFoundError("data")
    expected = r"expected the scores of 4 rows and finish\(\), got 3"
    with pytest.raises(ValueError, match=expected), folder.open_task(task) as writer:
        writer.write(batch)
        writer.finish({}, {})
    expected = r"expected the scores of 4 rows and finish\(\), got 4"
    with pytest.raises(ValueError, match=expected), folder.open_task(task) as writer:
        writer.write(batch)
        writer.write(batch[:1])
    assert [*digests(tmp_path / "out")] == ["run.json"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("disk", ["good", "full"])
def test_writers_end_quietly_after_an_error(tmp_path, description, monkeypatch, disk):
    """Nothing is written, and nothing reported, when what is left of a writer is deleted."""
    folder = RunFolder.open(tmp_path / "out", description)
    if disk == "full":

        def write(file, content):
            with outputs.output_errors("a"):
                raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(outputs.OutputFile, "write", write)
    expected = ZeroDivisionError if disk == "good" else OutputError
    with pytest.raises(expected), folder.open_task(Task(0, "a", (0,), 0, 300_000)) as writer:
        writer.write(pa.record_batch({"margin": np.zeros(200_000)}))
        raise ZeroDivisionError
    if disk == "full":
        with pytest.raises(OutputError):
            folder.write_table("a.parquet", pa.table({"a": [1]}))
    del writer
    gc.collect()
    assert [*digests(tmp_path / "out")] == ["run.json"]


def test_a_task_without_scores(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    with folder.open_task(plan.tasks[0]) as writer:
        writer.finish({"none": pa.table({})}, {"rows": np.int64(4)})
    assert folder.finished() == {0}
    assert set(digests(tmp_path / "out")) == {
        "run.json",
        "states/none/000000.arrow",
        "done/000000.json",
    }


def scores(rows):
    generator = np.random.default_rng(3)
    return pa.table(
        {
            "id": pa.array([f"id {row}" for row in range(rows)]),
            "target": pa.array(
                np.where(np.arange(rows) % 7 == 0, -1, 3), mask=np.arange(rows) % 7 == 0
            ),
            "margin": generator.standard_normal(rows, np.float32),
        }
    )


@pytest.mark.parametrize("rows", [1000, 131072, 131073, 300_000])
def test_bytes_do_not_depend_on_the_batches(tmp_path, description, rows):
    task, table = Task(0, "a", (0,), 0, rows), scores(rows)
    found = set()
    for batch in (rows, 131072, 100_000, 999):
        folder = RunFolder.open(tmp_path / f"out{batch}", description)
        with folder.open_task(task) as writer:
            for part in table.to_batches(batch):
                writer.write(part)
            writer.finish({}, {})
        found.add(tuple(digests(tmp_path / f"out{batch}").items()))
    assert len({frozenset(files) for files in found}) == 1
    path = tmp_path / f"out{rows}/scores/part-000000.parquet"
    assert pq.read_table(path) == table
    sizes = [
        pq.read_metadata(path).row_group(group).num_rows for group in range(-(-rows // 131072))
    ]
    assert sum(sizes) == rows and max(sizes) <= 131072


def test_states_keep_their_metadata(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    state = pa.table({"a": [1.5]}).replace_schema_metadata({"numbers": '{"rows": 3}'})
    with folder.open_task(plan.tasks[0]) as writer:
        writer.finish({"mine": state, "other": state}, {})
    read = folder.state(plan.tasks[0], "mine")
    assert read == state and read.schema.metadata == state.schema.metadata


def test_files_of_the_whole_run(tmp_path, plan, description):
    folder = RunFolder.open(tmp_path / "out", description)
    folder.write("figure.png", b"picture")
    folder.write_table("table.parquet", pa.table({"a": [1, 2]}))
    assert (tmp_path / "out/figure.png").read_bytes() == b"picture"
    assert pq.read_table(tmp_path / "out/table.parquet").to_pydict() == {"a": [1, 2]}
