"""Wrong arguments and wrong columns of a Scorer, what it pickles to, and what describes it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers import scored_heads as heads
from helpers.processes import python
from helpers.scored_heads import WIDTH, fixed_lists, linear
from marginops.scoring import DataError, Scorer
from marginops.scoring.statistics import STATISTICS

FEATURES = np.zeros((3, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": linear, "model": linear}, ValueError, "model: expected None with head"),
        ({"layer": "fc"}, ValueError, "layer: expected head, which holds the layer, got None"),
        ({"column": None}, TypeError, "column: expected a name, got NoneType"),
        ({"target": 3}, TypeError, "target: expected a name, got int"),
        ({"head": lambda: None}, TypeError, "head: expected a function that other processes can"),
        ({"head": linear()}, TypeError, "head: expected the path of a file, a function without"),
        ({"head": 3}, TypeError, "got int; write a function that returns it"),
        ({"model": "model.pt"}, ValueError, "model: expected a function without arguments or MOD"),
        ({"statistics": "margin"}, TypeError, "statistics: expected a sequence of names, got str"),
        ({"statistics": ()}, ValueError, "statistics: expected at least one name, got none"),
        ({"statistics": ["marign"]}, ValueError, "statistics: expected names out of margin, riva"),
        ({"statistics": ["loss"]}, ValueError, "statistics: expected target, the column of label"),
        ({"statistics": ["minimal_margin"]}, ValueError, "statistics: expected head for minimal_"),
        ({"statistics": ["gradient_norm"], "target": "y"}, ValueError, "expected head for gradie"),
        ({"id": "entropy", "statistics": ["entropy"]}, ValueError, "id: expected a column with an"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
        ({"log_norm": "1"}, TypeError, "log_norm: expected a number, got str"),
        ({"log_norm": float("nan")}, ValueError, "log_norm: expected a finite number, got nan"),
        ({"dtype": "half"}, ValueError, 'dtype: expected "float16", "bfloat16", "float32" or "fl'),
        (
            {"model": linear, "dtype": "float16"},
            ValueError,
            "dtype: expected None with model, whi",
        ),
        ({"device": "meta"}, ValueError, "device: expected cpu or cuda, got 'meta'"),
        ({"device": "gpu"}, ValueError, "device: expected cpu or cuda, got 'gpu'"),
        ({"batch_rows": 0}, ValueError, "batch_rows: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Scorer(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"features": FEATURES}, "column: expected one column 'embedding', got columns features"),
        ({"embedding": FEATURES}, "target: expected one column 'y', got columns embedding"),
        ({"embedding": FEATURES[:, 1:]}, "column: expected rows of 8 values in 'embedding', the w"),
        ({"embedding": FEATURES.astype(int)}, "column: expected [N, D] of float16, bfloat16, floa"),
        ({"embedding": FEATURES[0]}, "in 'embedding', got [8] of torch.float32"),
        ({"embedding": FEATURES, "y": [0, 1]}, "target: expected 3 values in 'y', one for each ro"),
        ({"embedding": FEATURES, "y": [0, 5, 1]}, "target: expected classes in [0, 5), null or ign"
                                                  "ore_index -100 in 'y', got 5 in row 1 of the b"),
        ({"embedding": FEATURES, "y": [0, -1, 1]}, "got -1 in row 1 of the batch"),
        ({"embedding": FEATURES, "y": [0.0, 1.0, 1.0]}, "target: expected a column of integers (cl"
                                                        "asses), got double in 'y'"),
        ({"embedding": FEATURES, "y": np.array([0, 2**63, 1], np.uint64)}, "target: expected class"
                                                                          "es in int64 in 'y'"),
        ({"embedding": FEATURES, "y": FEATURES}, "target: expected one value a row in 'y', got sh"),
        ({"embedding": FEATURES, "y": ["a", 1, 2]}, "target: expected values of one type in 'y'"),
        ({"embedding": FEATURES, "y": [0, 1, 2], "key": ["a", None, "b"]}, "id: expected an id in "
                                                    "every row of 'key', got null in row 1 of the"),
        ({"embedding": FEATURES, "y": [0, 1, 2], "key": [1.5, 2.5, 3.5]}, "id: expected a column o"
                                                          "f integers or strings, got double in '"),
        ({"embedding": FEATURES, "y": [0, 1, 2], "key": [1, 2]}, "id: expected 3 values in 'key'"),
    ],
)  # fmt: skip
def test_wrong_columns(batch: dict[str, Any], message: str) -> None:
    scorer = Scorer(linear, target="y", id="key" if "key" in batch else None)
    with pytest.raises(DataError, match=re.escape(message)):
        scorer(batch)


def test_a_batch_of_another_type() -> None:
    with pytest.raises(TypeError, match="batch: expected a mapping of arrays, a data frame, or"):
        Scorer(linear)(FEATURES)


def test_logits_of_another_width_than_before() -> None:
    scorer = Scorer()
    scorer({"embedding": FEATURES})
    with pytest.raises(
        DataError, match="expected logits of 8 classes as in the rows before, got 7"
    ):
        scorer({"embedding": FEATURES[:, 1:]})
    with pytest.raises(DataError, match="expected logits of at least 2 classes in 'embedding'"):
        Scorer()({"embedding": FEATURES[:, :1]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding": pa.list_(pa.float16(), 8)}, None),
        ({"embedding": pa.list_(pa.float32())}, None),
        ({"embedding": pa.fixed_shape_tensor(pa.float64(), [2, 4])}, None),
        ({"embedding": pa.list_(pa.float16(), 9)}, "expected rows of 8 values in 'embedding', the"),
        (
            {"embedding": pa.list_(pa.int8(), 8)},
            "column: expected a fixed_size_list, list, large_l",
        ),
        (
            {"embedding": pa.float32()},
            "column: expected a fixed_size_list, list, large_list or fix",
        ),
        (
            {"embedding": pa.binary(16)},
            "dtype: expected float16, bfloat16, float32, float64 for '",
        ),
        ({"features": pa.list_(pa.float16(), 8)}, "column: expected one column 'embedding', got c"),
        ({"y": pa.float32()}, "target: expected a column of integers (classes), got float in 'y'"),
        ({"key": pa.bool_()}, "id: expected a column of integers or strings, got bool in 'key'"),
        ({"key": pa.dictionary(pa.int8(), pa.string())}, None),
        ({"y": pa.dictionary(pa.int8(), pa.int64())}, None),
        ({"y": pa.dictionary(pa.int8(), pa.string())}, "target: expected a column of integers (cl"),
    ],
)
def test_schema(fields: dict[str, pa.DataType], message: str | None) -> None:
    right = {"embedding": pa.list_(pa.float16(), 8), "y": pa.int8(), "key": pa.string()}
    if "features" in fields:
        del right["embedding"]
    schema = pa.schema([*(right | fields).items()])
    scorer = Scorer(linear, target="y", id="key")
    for missing, argument in (("y", "target"), ("key", "id")):
        part = pa.schema([field for field in schema if field.name != missing])
        if "embedding" in part.names and message is None:
            with pytest.raises(DataError, match=f"{argument}: expected one column '{missing}', go"):
                scorer.check_schema(part)
    assert scorer.columns == ["embedding", "y", "key"]
    if message is None:
        scorer.check_schema(schema)
        return
    with pytest.raises(DataError, match=re.escape(message)):
        scorer.check_schema(schema)


def test_a_schema_of_bytes() -> None:
    scorer = Scorer(linear, dtype="float16")
    scorer.check_schema(pa.schema({"embedding": pa.binary(16)}))
    with pytest.raises(
        DataError, match="column: expected rows of 8 values in 'embedding', the wid"
    ):
        scorer.check_schema(pa.schema({"embedding": pa.binary(18)}))
    with pytest.raises(
        DataError, match="column: expected rows of float16, 2 bytes each, in 'embed"
    ):
        scorer.check_schema(pa.schema({"embedding": pa.binary(17)}))
    with pytest.raises(DataError, match="column: expected values of float16 in 'embedding', got"):
        scorer.check_schema(pa.schema({"embedding": pa.list_(pa.float32(), 8)}))


def test_a_schema_tells_the_number_of_classes_of_logits() -> None:
    scorer = Scorer()
    assert scorer.num_classes is None
    scorer.check_schema(pa.schema({"embedding": pa.list_(pa.float32(), 7)}))
    assert scorer.num_classes == 7
    assert pickle.loads(pickle.dumps(scorer)).num_classes == 7
    assert Scorer(linear).num_classes == 5


def test_a_scorer_pickles_to_its_arguments(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.randn(100, 500)}, tmp_path / "head.pt")
    scorer = Scorer(tmp_path / "head.pt", target="y", statistics=STATISTICS)
    batch = {"embedding": np.ones((4, 500), np.float32), "y": [1, 2, 3, 4]}
    wanted = scorer(batch)
    data = pickle.dumps(scorer)
    assert len(data) < 600 + len(str(tmp_path))
    got = pickle.loads(data)(batch)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
    assert pickle.loads(data).describe() == scorer.describe()


def test_a_function_of_the_current_folder_works_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_head.py").write_text(
        "import torch\ndef make():\n    return torch.eye(3), torch.arange(3.0)\n"
    )
    monkeypatch.chdir(tmp_path)
    scorer = Scorer("my_head:make", statistics=("prediction",))
    code = (
        "import pickle, sys, numpy as np; scorer = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(scorer({'embedding': np.array([[9, 0, 0], [0, 0, 0.0]])})['prediction'].tolist())"
    )
    process = python(code, pickle.dumps(scorer).hex())
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "[0, 2]\n"), errors


def test_description_is_what_the_results_depend_on(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    for name in ("one.pt", "two.pt"):
        torch.save({"fc.weight": weight}, tmp_path / name)
    first = Scorer(tmp_path / "one.pt").describe()
    assert json.loads(json.dumps(first)) == first
    assert first["head"]["shape"] == [4, 3]
    assert Scorer(tmp_path / "two.pt").describe() == first
    assert str(tmp_path) not in json.dumps(first)
    weight[2, 1] += 1e-3
    torch.save({"fc.weight": weight, "fc.bias": torch.zeros(4)}, tmp_path / "two.pt")
    assert Scorer(tmp_path / "two.pt").describe()["head"] != first["head"]
    torch.save({"fc.weight": weight}, tmp_path / "two.pt")
    assert Scorer(tmp_path / "two.pt").describe()["head"] != first["head"]
    changed = {"column": "x", "id": "key", "log_norm": 1.0, "ignore_index": -1, "dtype": "float16"}
    for name, value in changed.items():
        assert Scorer(tmp_path / "one.pt", **{name: value}).describe() != first  # type: ignore[arg-type]
    model = Scorer(model=heads.noted).describe()
    assert model["model"]["place"] == "helpers.scored_heads:noted"
    assert model == Scorer(model="helpers.scored_heads:noted").describe()
    assert repr(Scorer(heads.pair)) == (
        "Scorer('helpers.scored_heads:pair', column='embedding', statistics=('minimal_margin',))"
    )


def test_ids_keep_their_type() -> None:
    for ids in (
        pa.array([2**64 - 1, 0, 5], pa.uint64()),
        pa.array([-3, 0, 5], pa.int8()),
        pa.array(["a", "", "é"], pa.large_string()),
    ):
        table = pa.table({"embedding": fixed_lists(FEATURES), "key": ids})
        scored = Scorer(linear, id="key").score(table)
        assert scored.ids is not None
        assert scored.ids.equals(ids)
        assert Scorer(linear, id="key")(table)["key"].tolist() == ids.to_pylist()
    words = pa.array(["b", "a", "b"]).dictionary_encode()
    table = pa.table({"embedding": fixed_lists(FEATURES), "key": words})
    assert Scorer(linear, id="key")(table)["key"].tolist() == ["b", "a", "b"]
    labels = pa.array([4, None, 4]).dictionary_encode()
    table = pa.table({"embedding": fixed_lists(FEATURES), "y": labels})
    assert Scorer(linear, target="y")(table)["y"].tolist() == [4, -100, 4]
