import itertools
import os
import pickle
import tempfile
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_runs import SmallScorer, write_rows
from marginops.scoring import DataError, inputs
from marginops.scoring.inputs import InputFile, common_names, find_files
from marginops.scoring.plan import Plan, Task, make_plan


def locations(files):
    return [file.location for file in find_files(files)]


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=4),
    task_rows=st.integers(1, 25),
)
def test_tasks_cover_each_row_once_in_order(files, task_rows):
    with tempfile.TemporaryDirectory() as folder:
        paths, total = [], 0
        for index, row_groups in enumerate(files):
            paths.append(Path(folder, f"{index}.parquet"))
            total = write_rows(paths[-1], row_groups, total)
        plan = make_plan(paths, SmallScorer(), task_rows)
        rows = []
        for task in plan.tasks:
            assert task.first_row == len(rows)
            with pq.ParquetFile(task.path) as file:
                rows += file.read_row_groups(task.row_groups)["row"].to_pylist()
            assert len(rows) == task.first_row + task.num_rows
    assert rows == [*range(total)] and plan.num_rows == total
    assert [task.index for task in plan.tasks] == [*range(len(plan.tasks))]
    for task, after in itertools.zip_longest(plan.tasks, plan.tasks[1:]):
        row_groups = files[paths.index(Path(task.path))]
        sizes = [row_groups[group] for group in task.row_groups]
        assert all(sizes) and sum(sizes[:-1]) < task_rows
        if after is not None and after.path == task.path:
            assert task.num_rows >= task_rows


def test_files_of_a_plan(tmp_path):
    write_rows(tmp_path / "a.parquet", [3, 3])
    write_rows(tmp_path / "b.parquet", [2])
    plan = make_plan(tmp_path, SmallScorer(), task_rows=4)
    assert plan.tasks == (
        Task(0, f"{tmp_path}/a.parquet", (0, 1), 0, 6),
        Task(1, f"{tmp_path}/b.parquet", (0,), 6, 2),
    )
    assert [(file.path, file.name, file.num_rows) for file in plan.files] == [
        (f"{tmp_path}/a.parquet", "a.parquet", 6),
        (f"{tmp_path}/b.parquet", "b.parquet", 2),
    ]
    assert [file.num_bytes for file in plan.files] == [
        os.path.getsize(tmp_path / name) for name in ("a.parquet", "b.parquet")
    ]
    assert plan.schema == pa.schema({"row": pa.int64()})
    assert len({file.footer_sha256 for file in plan.files}) == 2


def test_tasks_and_plans_are_pickled(tmp_path):
    write_rows(tmp_path / "a.parquet", [3, 3])
    plan = make_plan(tmp_path, SmallScorer(), task_rows=4)
    assert pickle.loads(pickle.dumps(plan)) == plan and isinstance(plan, Plan)
    assert len(pickle.dumps(plan.tasks[0])) < 300


def test_a_footer_of_many_row_groups(tmp_path):
    """Larger than what is read first."""
    write_rows(tmp_path / "a.parquet", [1] * 2000)
    plan = make_plan(tmp_path / "a.parquet", SmallScorer(), task_rows=100)
    assert [task.num_rows for task in plan.tasks] == [100] * 20
    assert plan.tasks[7].row_groups == tuple(range(700, 800))


@pytest.mark.parametrize("task_rows", [1.5, True, "3", 0, -1])
def test_wrong_task_rows(tmp_path, task_rows):
    with pytest.raises((TypeError, ValueError), match="task_rows: expected"):
        make_plan(tmp_path, SmallScorer(), task_rows)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.list_(pa.float16(), 128), 16384),
        (pa.list_(pa.float16(), 129), 8192),
        (pa.list_(pa.float32(), 768), 1024),
        (pa.list_(pa.float64(), 1 << 20), 256),
        (pa.list_(pa.list_(pa.uint16(), 64), 4), 8192),
        (pa.fixed_shape_tensor(pa.float32(), (32, 32)), 1024),
        (pa.binary(256), 16384),
        (pa.binary(4096), 1024),
        (pa.int64(), 65536),
        (pa.bool_(), 65536),
    ],
)
def test_rows_of_a_batch_follow_from_the_type(tmp_path, kind, expected):
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    column = pa.nulls(2, storage)
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.ExtensionArray.from_storage(kind, column)
    write(tmp_path / "a.parquet", row=column)
    assert make_plan(tmp_path, SmallScorer()).batch_rows == expected


def test_rows_of_a_batch_follow_from_the_footer_of_lists(tmp_path):
    for index, width in enumerate((1000, 2000)):
        values = pa.array([np.zeros(width, np.float32)] * 4, pa.list_(pa.float32()))
        write(tmp_path / f"{index}.parquet", row=values)
    # 1500 numbers a row, on average: 699 rows have 4 MiB.
    assert make_plan(tmp_path, SmallScorer()).batch_rows == 512


def test_rows_of_a_batch_follow_from_the_footer_of_bytes(tmp_path):
    pictures = [np.random.default_rng(seed).bytes(7_000) for seed in range(40)]
    write(tmp_path / "a.parquet", row=pa.array(pictures), other=pa.array(["x" * 100_000] * 40))
    assert make_plan(tmp_path, SmallScorer()).batch_rows == 512


def test_rows_of_a_batch_that_are_given(tmp_path):
    write_rows(tmp_path / "a.parquet", [0])
    assert make_plan(tmp_path, SmallScorer()).batch_rows == 65536
    plan = make_plan(tmp_path, SmallScorer(batch_rows=7))
    assert plan.batch_rows == 7 and plan.num_rows == 0 and plan.tasks == ()


def test_descriptions_do_not_name_the_folder(tmp_path):
    for place in ("first", "second/deeper"):
        for name in ("x/a.parquet", "y/a.parquet"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True)
            write_rows(path, [3])
    plans = [
        make_plan([tmp_path / place / "x", tmp_path / place / "y"], SmallScorer(), 2)
        for place in ("first", "second/deeper")
    ]
    assert plans[0].describe() == plans[1].describe()
    assert plans[0].describe() == {
        "rows": 6,
        "task_rows": 2,
        "batch_rows": 65536,
        "files": [
            {
                "name": name,
                "bytes": file.num_bytes,
                "rows": 3,
                "footer_sha256": file.footer_sha256,
            }
            for name, file in zip(("x/a.parquet", "y/a.parquet"), plans[0].files, strict=True)
        ],
    }


def test_another_content_has_another_digest(tmp_path):
    digests = set()
    for first_row in (0, 1):
        write_rows(tmp_path / "a.parquet", [3], first_row)
        digests.add(make_plan(tmp_path, SmallScorer()).files[0].footer_sha256)
    assert len(digests) == 2


def test_common_names():
    def names(*paths):
        return common_names([InputFile("", None, path) for path in paths])

    assert names("/a/b/c") == ["c"]
    assert names("/a/b/c", "/a/d") == ["b/c", "d"]
    assert names("/ab/c", "/ad/c") == ["ab/c", "ad/c"]
    assert names("bucket/x", "other/y") == ["bucket/x", "other/y"]


def test_folders_are_sorted_and_not_entered(tmp_path):
    for name in ("b.parquet", "a.parquet", ".c.parquet", "d.txt", "e/f.parquet"):
        write(tmp_path / name, row=[1])
    assert locations(tmp_path) == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]
    assert locations(str(tmp_path) + "/") == locations([tmp_path])
    assert locations([tmp_path / "d.txt"]) == [f"{tmp_path}/d.txt"]


def test_order_of_the_names_is_kept(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / name / "x.parquet", row=[1])
    assert locations([tmp_path / "b", tmp_path / "a/x.parquet"]) == [
        f"{tmp_path}/b/x.parquet",
        f"{tmp_path}/a/x.parquet",
    ]


@pytest.mark.parametrize("form", ["local", "relative", "file", "memory"])
def test_patterns(tmp_path, monkeypatch, form):
    names = ["a 1/p.parquet", "a 2/p.parquet", "a 2/q/r.parquet", "b/[1].parquet"]
    for name in names:
        write(tmp_path / name, row=[1])
    root = str(tmp_path)
    if form == "relative":
        monkeypatch.chdir(tmp_path)
    if form == "memory":
        root = "memory://patterns"
        for name in names:
            fsspec.filesystem("memory").pipe_file(f"{root}/{name}", (tmp_path / name).read_bytes())
    prefix = {"relative": "", "file": f"file://{root}/"}.get(form, f"{root}/")

    def found(pattern):
        return [location.removeprefix(f"{root}/") for location in locations(prefix + pattern)]

    space = "%20" if form == "file" else " "
    assert found(f"a{space}*/*.parquet") == ["a 1/p.parquet", "a 2/p.parquet"]
    assert found("**/*.parquet") == names
    assert found(f"a{space}*") == ["a 1/p.parquet", "a 2/p.parquet"]
    assert found("b") == ["b/[1].parquet"]
    if form != "file":
        assert found("b/[1].parquet") == ["b/[1].parquet"]
        assert found("a ?/p.parquet") == ["a 1/p.parquet", "a 2/p.parquet"]
    plan = make_plan(prefix + "**/*.parquet", SmallScorer(), 1)
    assert [file.name for file in plan.files] == names and plan.num_rows == 4


def test_patterns_at_the_root_of_a_file_system(tmp_path):
    path = write(tmp_path / "a.parquet", row=[1])
    fsspec.filesystem("memory").pipe_file("memory://root1.parquet", path.read_bytes())
    assert locations("memory://root?.parquet") == ["memory://root1.parquet"]
    assert make_plan(locations("memory://root*"), SmallScorer()).num_rows == 1


def test_uris_of_files_in_a_folder(monkeypatch):
    """pyarrow decodes URIs, which may have options; each file gets a URI of the same form."""
    names = ["bucket/in put/b 1.parquet", "bucket/in put/a#?.parquet"]

    class Store:
        type_name = "s3"

        def get_file_info(self, place):
            if isinstance(place, str):
                return pa.fs.FileInfo(place, pa.fs.FileType.Directory)
            assert place.base_dir == "bucket/in put"
            return [pa.fs.FileInfo(name, pa.fs.FileType.File) for name in names]

    def resolve(location):
        return Store(), unquote(location.partition("?")[0].removeprefix("s3://"))

    monkeypatch.setattr(inputs, "resolve", resolve)
    found = find_files("s3://bucket/in%20put?region=a")
    assert [file.path for file in found] == sorted(names)
    assert [file.location for file in found] == [
        "s3://bucket/in%20put/a%23%3F.parquet?region=a",
        "s3://bucket/in%20put/b%201.parquet?region=a",
    ]


def test_a_file_twice(tmp_path):
    path = write(tmp_path / "a.parquet", row=[1])
    (tmp_path / "link.parquet").symlink_to(path)
    for second in (path, tmp_path / "link.parquet", f"file://{path}", tmp_path / "a.*"):
        with pytest.raises(DataError, match=r"files: expected each file once, got .* twice"):
            find_files([path, second])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.parquet", r"missing.parquet: expected a file, a folder or a pattern"),
        ("nothing*.parquet", r"nothing\*.parquet: expected a pattern that matches files"),
        ("folder", r'folder: expected \*.parquet files directly .* "FOLDER/\*\*/\*.parquet"'),
    ],
)
def test_names_of_no_file(tmp_path, name, message):
    write(tmp_path / "folder/inner/a.parquet", row=[1])
    with pytest.raises(DataError, match=message):
        make_plan(tmp_path / name, SmallScorer())


def test_no_names():
    with pytest.raises(DataError, match=r"files: expected at least one Parquet file, got none"):
        make_plan([], SmallScorer())


def test_unknown_file_systems():
    for url in ("unheard://bucket/a.parquet", "s3://key:secret@bucket/ a?region=x"):
        with pytest.raises(DataError, match=r"expected a path, or a URL that pyarrow") as caught:
            make_plan(url, SmallScorer())
        assert "secret" not in str(caught.value).partition("got an error")[0]


def test_damaged_files(tmp_path):
    good = write(tmp_path / "good.parquet", row=[*range(1000)])
    content = good.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    damaged = {
        "an empty file": b"",
        "4 bytes that do not end": b"PAR1",
        "do not end as a Parquet file does": content[:-5],
        "half": content[: len(content) // 2],
        "a text": b"row\n" * 100,
        "an encrypted one": content[:-4] + b"PARE",
        "a footer of 4,294,967,": content[:-8] + b"\xff\xff\xff\xff" + b"PAR1",
        "error": content[: -8 - length] + bytes(length) + content[-8:],
    }
    for reason, bad in damaged.items():
        path = tmp_path / "bad.parquet"
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"bad.parquet: expected a .*Parquet file, got ") as got:
            make_plan([good, path], SmallScorer())
        if reason not in ("half", "a text"):
            assert reason in str(got.value)


def test_a_folder_that_cannot_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads every folder")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed: expected"):
        make_plan(tmp_path / "closed", SmallScorer())


def test_columns_that_files_lack_or_hold_with_another_type(tmp_path):
    first = write(tmp_path / "first.parquet", row=[1], label=[1], extra=["a"])
    fewer = write(tmp_path / "fewer.parquet", row=[1])
    other = write(tmp_path / "other.parquet", row=pa.array([1], pa.int32()), label=[1])
    same = write(tmp_path / "same.parquet", label=[2], row=[1], extra=[1.5])
    scorer = SmallScorer(target="label")
    assert make_plan([first, same], scorer).num_rows == 2
    with pytest.raises(DataError, match=r"fewer.parquet: column: expected label, got row"):
        make_plan([first, fewer], scorer)
    expected = (
        r'other.parquet: expected column "row" of type int64 as in .*first.parquet, got int32'
    )
    with pytest.raises(DataError, match=expected):
        make_plan([first, same, other], scorer)
