"""Files, columns and heads that the score command refuses, each in one line."""

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

from helpers.score_files import WIDTH, score


@pytest.mark.parametrize("option", ["--column", "--target", "--id"])
def test_a_missing_column(files, refused, option):
    columns = "id, label, embedding; check the name"
    message = f"{option[2:]}: expected one column 'nothing', got columns {columns}"
    refused(files.run(option, "nothing"), f".*/data/a.parquet: {message}")
    assert not (files.folder / "out").exists()


def test_columns_of_other_types(files, refused):
    refused(files.run("--column", "id"), ".*/data/a.parquet: column: expected .*, got int64")
    refused(
        files.run("--target", "embedding"), ".*/data/a.parquet: target: expected .*, got fixed.*"
    )


def test_a_column_of_bytes_without_a_dtype(files, refused):
    size = 2 * WIDTH
    files.write(embedding=pa.array([row.tobytes() for row in files.values], pa.binary(size)))
    message = ".*/data/a.parquet: dtype: expected float16, .* for 'embedding' of type fixed.*"
    refused(files.run(), message)
    refused(
        files.run("--dtype", "float64"), ".*/data/a.parquet: column: expected rows of float64.*"
    )


def test_a_head_of_another_width(files, refused):
    torch.save({"weight": torch.zeros(4, WIDTH + 1)}, files.folder / "head.pt")
    message = (
        f".*/data/a.parquet: column: expected rows of {WIDTH + 1} values in 'embedding', the width "
        f"of the head .*/head.pt, got {WIDTH}; take the head of the network that the rows come from"
    )
    refused(files.run(), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--head: expected a file that can be read, got .*/head.pt .*No such file.*"),
        (b"", "--head: expected a whole file of safetensors or torch.save, got .*/head.pt .*"),
        (b"weights", "--head: expected .*, got .*/head.pt .*"),
    ],
)
def test_a_head_that_cannot_be_read(files, refused, content, message):
    (files.folder / "head.pt").unlink()
    if content is not None:
        (files.folder / "head.pt").write_bytes(content)
    refused(files.run(), message)


def test_a_file_with_several_layers(files, refused):
    state = {"first.weight": torch.ones(WIDTH, WIDTH), "last.weight": torch.ones(4, WIDTH)}
    torch.save(state, files.folder / "head.pt")
    message = (
        r"--head: expected one layer with a matrix named NAME.weight in .*/head.pt, got 'first' "
        r"\[6, 6\], 'last' \[4, 6\]; pass --layer, the name of one"
    )
    refused(files.run(), message)
    assert files.run("--layer", "last") == 0


def test_rows_of_several_lengths(files, refused):
    rows = files.values.tolist()
    rows[433] = rows[433][:-1]
    files.write(embedding=pa.array(rows, pa.list_(pa.float16())))
    message = (
        ".*/data/b.parquet, row group 0: column: expected rows of 6 values in 'embedding', got 5 "
        "in row 83 of the row group; write rows of one length, or null"
    )
    refused(files.run(), message)
    assert len(list((files.folder / "out/done").iterdir())) == 4  # the tasks before


def test_a_label_out_of_range(files, refused):
    files.label[655] = 4
    files.write()
    message = (
        r".*/data/b.parquet, row group 3: target: expected classes in \[0, 4\), null or "
        "ignore_index -100 in 'label', got 4 in row 5 of the row group; count classes from 0 on"
    )
    refused(files.run("--target", "label"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,label\n1,2\n", "13 bytes that do not end as a Parquet file does"),
        (b"", "an empty file"),
        ("half", "[0-9,]+ bytes that do not end as a Parquet file does"),
    ],
)
def test_a_file_that_is_no_parquet_file(files, refused, content, message):
    path = files.data / "b.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    message = (
        f".*/data/b.parquet: expected a complete Parquet file, got {message}; write the file anew, "
        "or leave it out"
    )
    refused(files.run(), message)
    assert not (files.folder / "out").exists()


def test_a_corrupt_page(files, refused):
    path = files.data / "b.parquet"
    part = pq.ParquetFile(path).metadata.row_group(2).column(2)
    start = part.data_page_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + part.total_compressed_size] = b"\xff" * part.total_compressed_size
    path.write_bytes(whole)
    refused(
        files.run(), r".*/data/b.parquet, row group 2: expected rows that can be read, got an .*"
    )
    assert len(list((files.folder / "out/done").iterdir())) == 6  # the tasks before


def test_no_such_file(refused, files):
    status = score(
        files.folder / "nowhere", "--logits", "--column", "x", "--output", files.folder / "out"
    )
    message = "expected a file, a folder or a pattern, got nothing there; check the path"
    refused(status, f".*/nowhere: {message}")
