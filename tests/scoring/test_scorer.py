"""Scorer: its statistics against their formulas, torch and SciPy, for every form of a batch."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas
import pyarrow as pa
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given

from helpers.scored_heads import (
    CLASSES,
    WIDTH,
    double_pair,
    expected,
    fixed_lists,
    linear,
    pair,
    wide,
)
from marginops.scoring import Scorer
from marginops.scoring.head import Head
from marginops.scoring.statistics import STATISTICS
from marginops.scoring.tiles import PlacedHead, score_rows

CLASS_NUMBERS = ("rival", "prediction", "correct")
DTYPES = {"float16": 1e-4, "bfloat16": 1e-4, "float32": 1e-4, "float64": 1e-11}


def rows(count: int, dtype: str = "float32") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features that the dtype holds exactly, and labels."""
    generator = np.random.default_rng(count)
    features = torch.from_numpy(generator.standard_normal((count, WIDTH)))
    features = features.to(getattr(torch, dtype))
    if dtype == "bfloat16":
        return features.view(torch.uint16).numpy(), generator.integers(0, CLASSES, count)
    return features.numpy(), generator.integers(0, CLASSES, count)


def as_double(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    tensor = torch.from_numpy(values)
    return (tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor).double().numpy()


def assert_close(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    for name in CLASS_NUMBERS:
        np.testing.assert_array_equal(got[name], wanted[name], name)
    for name in wanted.keys() - set(CLASS_NUMBERS):
        np.testing.assert_allclose(got[name], wanted[name], tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2047, 5000])
def test_statistics_are_those_of_the_formulas(dtype: str, count: int) -> None:
    features, label = rows(count, dtype)
    scorer = Scorer(pair, target="label", statistics=STATISTICS)
    got = scorer({"embedding": features, "label": label})
    weight, bias = (value.detach().double().numpy() for value in pair())
    doubles = as_double(features)
    wanted = expected(doubles @ weight.T + bias, label, doubles, weight)
    assert [*got] == ["label", *STATISTICS]
    assert_close(got, wanted, DTYPES[dtype])
    assert got["margin"].dtype == (np.float64 if dtype == "float64" else np.float32)


def test_a_head_in_float64_computes_in_float64() -> None:
    features, label = rows(3000, "float32")
    got = Scorer(double_pair, target="label", statistics=STATISTICS)(
        {"embedding": features, "label": label}
    )
    weight, bias = (value.detach().numpy() for value in double_pair())
    doubles = features.astype(np.float64)
    assert_close(got, expected(doubles @ weight.T + bias, label, doubles, weight), 1e-11)


def test_logits_need_no_head() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (3000, 7)).astype(np.float32)
    label = np.arange(3000) % 7
    names = [name for name in STATISTICS if name not in ("minimal_margin", "gradient_norm")]
    got = Scorer(column="logits", target="label", statistics=names)(
        {"logits": logits, "label": label}
    )
    doubles = logits.astype(np.float64)
    wanted = expected(doubles, label, doubles, np.zeros((7, 7)))
    assert_close(got, {name: wanted[name] for name in names}, 1e-4)
    tensor = torch.from_numpy(logits)
    loss = F.cross_entropy(tensor, torch.from_numpy(label), reduction="none")
    np.testing.assert_allclose(got["loss"], loss, 1e-5, 1e-6)
    softmax = scipy.special.softmax(doubles, axis=1)
    np.testing.assert_allclose(got["entropy"], scipy.stats.entropy(softmax, axis=1), 1e-4, 1e-6)
    top = np.sort(softmax, axis=1)
    np.testing.assert_allclose(got["probability_margin"], top[:, -1] - top[:, -2], 1e-4, 1e-6)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("log_norm", [None, 1.5, 200.0])
def test_a_statistic_alone_is_that_of_all(name: str, log_norm: float | None) -> None:
    features, label = rows(3000)
    batch = {"embedding": features, "label": label}
    every = Scorer(linear, target="label", statistics=STATISTICS, log_norm=log_norm)
    alone = Scorer(linear, target="label", statistics=[name], log_norm=log_norm)
    np.testing.assert_array_equal(alone(batch)[name], every(batch)[name])


def test_the_lowest_class_counts_among_ties() -> None:
    logits = np.random.default_rng(0).integers(0, 3, (500, 4)).astype(np.float32)
    label = np.arange(500) % 4
    scorer = Scorer(target="label", statistics=CLASS_NUMBERS)
    got = scorer({"embedding": logits, "label": label})
    wanted = expected(logits.astype(np.float64), label, logits, np.zeros((4, 4)))
    for name in CLASS_NUMBERS:
        np.testing.assert_array_equal(got[name], wanted[name], name)


def test_log_norm_divides_the_margins_alone() -> None:
    features, label = rows(100)
    batch = {"embedding": features, "label": label}
    plain = Scorer(linear, target="label", statistics=STATISTICS)(batch)
    normed = Scorer(linear, target="label", statistics=STATISTICS, log_norm=torch.tensor(2.0))(
        batch
    )
    for name in STATISTICS:
        factor = np.exp(-2) if name in ("margin", "top2_margin") else 1
        np.testing.assert_allclose(normed[name], plain[name] * factor, 1e-5, 0)


@pytest.mark.parametrize(
    ("arguments", "default"),
    [
        ({"head": linear, "target": "label"}, "margin"),
        ({"head": linear}, "minimal_margin"),
        ({}, "top2_margin"),
        ({"target": "label"}, "margin"),
    ],
)
def test_default_statistic(arguments: dict[str, Any], default: str) -> None:
    assert Scorer(**arguments).statistics == (default,)


def test_results_share_no_memory_with_the_batch() -> None:
    features, label = rows(10)
    table = pa.table({"embedding": fixed_lists(features), "label": label})
    result = Scorer(linear, target="label", statistics=STATISTICS)(table)
    for value in result.values():
        value[:] = 0
    assert table["label"].to_pylist() == label.tolist()


def test_every_form_of_a_batch_gives_the_same_bits() -> None:
    features, label = rows(2500, "float16")
    ids = [f"s{row}" for row in range(2500)]
    scorer = Scorer(linear, target="label", id="key", statistics=STATISTICS)
    wanted = scorer({"embedding": features, "label": label, "key": ids})
    assert wanted["key"].tolist() == ids
    frozen = features.copy()
    frozen.flags.writeable = False
    lists = fixed_lists(features)
    column = {"label": pa.array(label.astype(np.uint8)), "key": pa.array(ids)}
    parts = [
        pa.table({"embedding": lists, **column}).slice(start, 700) for start in range(0, 2500, 700)
    ]
    objects = np.empty(2500, dtype=object)
    objects[:] = [*features]
    batches: dict[str, Any] = {
        "frozen": {"embedding": frozen, "label": label, "key": np.array(ids)},
        "Fortran": {"embedding": np.asfortranarray(features), "label": label, "key": ids},
        "reversed": {"embedding": features[::-1].copy()[::-1], "label": label, "key": ids},
        "big-endian": {"embedding": features.astype(">f2"), "label": label, "key": ids},
        "torch": {"embedding": torch.tensor(features), "label": torch.tensor(label), "key": ids},
        "objects": {"embedding": objects, "label": [*label], "key": ids},
        "rows": {"embedding": [*features], "label": [*label], "key": ids},
        "pandas": pandas.DataFrame({"embedding": [*features], "label": label, "key": ids}),
        "batch": pa.record_batch({"embedding": lists, **column}),
        "chunks": pa.concat_tables(parts),
        "list": pa.table({"embedding": lists.cast(pa.list_(pa.float16())), **column}),
        "large": pa.table({"embedding": lists.cast(pa.large_list(pa.float16())), **column}),
        "tensor": pa.table(
            {
                "embedding": pa.ExtensionArray.from_storage(
                    pa.fixed_shape_tensor(pa.float16(), [2, WIDTH // 2]), lists
                ),
                **column,
            }
        ),
    }
    for form, batch in batches.items():
        got = scorer(batch)
        assert [*got] == [*wanted]
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name], value, form)
            assert got[name].dtype == value.dtype, form
    binary = pa.array([row.tobytes() for row in features], pa.binary(2 * WIDTH))
    stated = Scorer(linear, target="label", id="key", statistics=STATISTICS, dtype="float16")
    got = stated(pa.table({"embedding": binary, **column}))
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, "binary")


@given(data=st.data())
def test_any_part_of_arrow_data_has_the_scores_of_its_rows(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    kind = data.draw(st.sampled_from(["fixed", "list", "large"]))
    values = data.draw(
        st.lists(
            st.one_of(
                st.none(),
                st.lists(
                    st.sampled_from([0.0, 1.0, -2.0, 0.5, np.nan, np.inf, -np.inf, 6e4]),
                    min_size=WIDTH,
                    max_size=WIDTH,
                ),
            ),
            min_size=count,
            max_size=count,
        )
    )
    element = pa.from_numpy_dtype(dtype)
    types = {"fixed": pa.list_(element, WIDTH), "list": pa.list_(element)}
    array = pa.array(
        [None if row is None else [dtype(value) for value in row] for row in values],
        types.get(kind, pa.large_list(element)),
    )
    labels = data.draw(
        st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=count, max_size=count)
    )
    table = pa.record_batch({"embedding": array, "label": pa.array(labels, pa.int8())})
    start = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count - start))
    scorer = Scorer(pair, target="label", statistics=STATISTICS)
    scored = scorer.score(table.slice(start, length), 100)
    part = values[start : start + length]
    finite = [row is not None and bool(np.isfinite(row).all()) for row in part]
    assert scored.first_row == 100
    assert len(scored) == length
    assert scored.is_finite.tolist() == finite
    nan = [row is not None and bool(np.isnan(row).any()) for row in part]
    assert scored.counts == {
        "rows": length,
        "missing": part.count(None),
        "nan": sum(nan),
        "infinite": length - sum(finite) - sum(nan) - part.count(None),
        "overflow": 0,
        "unlabelled": labels[start : start + length].count(None),
    }
    weight, bias = (value.detach().double().numpy() for value in pair())
    for row, (value, label) in enumerate(zip(part, labels[start : start + length], strict=True)):
        got = {name: result[row].item() for name, result in scored.values.items()}
        if not finite[row]:
            assert all(np.isnan(got[n]) for n in got if n not in CLASS_NUMBERS)
            assert (got["rival"], got["prediction"], got["correct"]) == (-1, -1, False)
            continue
        doubles = np.array([value], dtype)
        doubles = doubles.astype(np.float64)
        wanted = expected(doubles @ weight.T + bias, np.array([label or 0]), doubles, weight)
        wanted = {name: values[0] for name, values in wanted.items()}
        if label is None:
            wanted |= {"margin": np.inf, "rival": 0, "loss": 0, "confidence": 1, "correct": True}
            wanted |= {"el2n": 0, "gradient_norm": 0}
        size = max(1.0, np.abs(doubles).max())
        for name, one in wanted.items():
            np.testing.assert_allclose(got[name], one, 1e-4, 1e-5 * size, err_msg=name)


@pytest.mark.parametrize("classes", [2, 4097, 6000])
@pytest.mark.parametrize("log_norm", [None, 1.5])
def test_heads_of_any_number_of_classes(classes: int, log_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, WIDTH, generator=generator)
    bias = torch.randn(classes, generator=generator)
    features = torch.randn(2100, WIDTH, generator=generator)
    label = torch.randint(classes, (2100,), generator=generator)
    label[:50] = (features[:50] @ weight.T + bias).argmax(1)
    cpu = torch.device("cpu")
    placed = PlacedHead(Head(weight, bias, "here"), cpu)
    got = score_rows(features, label, None, STATISTICS, placed, cpu, log_norm).values
    doubles = features.double().numpy()
    logits = doubles @ weight.double().numpy().T + bias.double().numpy()
    wanted = expected(logits, label.numpy(), doubles, weight.double().numpy())
    for name in ("margin", "top2_margin"):
        wanted[name] *= np.exp(-(log_norm or 0))
    assert_close({name: value.numpy() for name, value in got.items()}, wanted, 1e-4)
    for name in STATISTICS:
        alone = score_rows(features, label, None, [name], placed, cpu, log_norm).values
        torch.testing.assert_close(alone[name], got[name], rtol=0, atol=0)


def test_features_are_the_values_or_the_logits() -> None:
    features, label = rows(2500, "float16")
    batch = {"embedding": features, "label": label}
    scored = Scorer(linear, target="label").score(batch, 7, features=True)
    assert scored.features is not None
    assert scored.features.dtype == torch.float32
    np.testing.assert_array_equal(scored.features.numpy(), features.astype(np.float32))
    assert (scored.num_classes, scored.first_row, scored.ids) == (CLASSES, 7, None)
    assert Scorer(linear, target="label").score(batch, 7).features is None
    logits = Scorer(target="label").score(batch, features=True)
    assert logits.features is not None
    np.testing.assert_array_equal(logits.features.numpy(), features.astype(np.float32))
    assert logits.num_classes == WIDTH


@pytest.mark.parametrize("head", [linear, wide])
def test_scores_do_not_depend_on_autocast_or_earlier_batches(head: Any) -> None:
    features, label = rows(3000)
    batch = {"embedding": features, "label": label}
    scorer = Scorer(head, target="label", statistics=STATISTICS)
    first = scorer(batch)
    scorer({"embedding": features[:1000], "label": label[:1000]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = scorer(batch)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count: int) -> None:
    batch = {
        "embedding": np.zeros((count, WIDTH), np.float16),
        "label": np.zeros(count, np.int32),
        "id": np.arange(count, dtype=np.uint64),
    }
    scorer = Scorer(linear, target="label", id="id", statistics=STATISTICS)
    for given_batch in (
        batch,
        pa.table(batch | {"embedding": fixed_lists(np.zeros((count, WIDTH), np.float16))}),
    ):
        got = scorer(given_batch)
        assert all(len(value) == count for value in got.values())
        assert got["id"].dtype == np.uint64
        assert got["margin"].dtype == np.float32


def test_a_batch_of_logits_without_rows() -> None:
    scorer = Scorer(column="logits", target="label")
    table = pa.table(
        {"logits": pa.array([], pa.list_(pa.float32())), "label": pa.array([], "int8")}
    )
    assert scorer.score(table).num_classes == 0
    assert scorer.num_classes is None
    assert len(scorer({"logits": np.zeros((3, 4), np.float32), "label": [0, 1, 2]})["margin"]) == 3
    assert scorer.num_classes == 4
    assert scorer.score(table).num_classes == 4


def test_with_statistics_adds_to_a_copy() -> None:
    scorer = Scorer(linear, target="label")
    more = scorer.with_statistics(["rival", "margin", "prediction"])
    assert scorer.statistics == ("margin",)
    assert more.statistics == ("margin", "rival", "prediction")
    features, label = rows(10)
    batch = {"embedding": features, "label": label}
    np.testing.assert_array_equal(more(batch)["margin"], scorer(batch)["margin"])
