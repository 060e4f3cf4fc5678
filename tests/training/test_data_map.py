"""The data map of TrainingDynamics and its figure, and the table with its files."""

import pytest
import torch

from helpers.dynamics_batches import batches
from helpers.rounding import assert_same
from marginops.training import DataMap, TrainingDynamics
from marginops.training.dynamics import data_map

SAMPLES = 40


@pytest.fixture
def dynamics():
    dynamics = TrainingDynamics(SAMPLES)
    for batch in batches(SAMPLES - 5, 12, 9):
        dynamics.update(*batch)
    return dynamics


def test_the_map_holds_the_samples_that_were_seen(dynamics):
    points = dynamics.data_map()
    assert 0 < len(points.indices) < SAMPLES
    assert points.indices.tolist() == [i for i, n in enumerate(dynamics.count.tolist()) if n]
    for name in ("confidence", "variability", "correctness"):
        assert_same(getattr(points, name), getattr(dynamics, name)[points.indices])
    assert str(points).startswith("DataMap(indices=int64[")
    assert len(TrainingDynamics(3).data_map().indices) == 0


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_the_figure_shows_every_sample_and_rings(dynamics, pyplot):
    points = dynamics.data_map()
    chosen = torch.tensor([SAMPLES - 1, *points.indices[:3].tolist()])  # the first was never seen
    figure, ax = points.plot(highlight=chosen)
    drawn, rings = ax.collections
    expected = torch.stack((points.variability, points.confidence), 1)
    torch.testing.assert_close(torch.tensor(drawn.get_offsets().data).float(), expected)
    torch.testing.assert_close(torch.tensor(drawn.get_array().data).float(), points.correctness)
    torch.testing.assert_close(torch.tensor(rings.get_offsets().data).float(), expected[:3])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("variability", "confidence")
    _, given = pyplot.subplots()
    assert points.plot(given)[1] is given
    figure.canvas.draw()


@pytest.mark.parametrize(("samples", "drawn"), [(0, 0), (1, 1), (9, 9), (10, 5), (31, 8)])
def test_the_figure_thins_out_many_samples(pyplot, monkeypatch, samples, drawn):
    monkeypatch.setattr(data_map, "_DRAWN", 9)
    points = DataMap(torch.arange(samples), *torch.rand(3, samples))
    _, ax = points.plot()
    assert len(ax.collections[0].get_offsets()) == drawn <= 9


def test_wrong_samples_to_highlight_are_named(dynamics):
    with pytest.raises(TypeError, match=r"highlight: expected a tensor \[K\], got list"):
        dynamics.data_map().plot(highlight=[1])
    with pytest.raises(TypeError, match=r"highlight: expected dtype torch.int64, got .*float32"):
        dynamics.data_map().plot(highlight=torch.rand(3))


def test_the_table_survives_parquet_and_pandas(dynamics, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = dynamics.to_table()
    parquet.write_table(table, tmp_path / "dynamics.parquet")
    read = parquet.read_table(tmp_path / "dynamics.parquet")
    assert read.schema == table.schema
    assert read.column_names == ["index", *data_map.COLUMNS]
    for name in read.column_names:
        expected = torch.arange(SAMPLES) if name == "index" else getattr(dynamics, name)
        assert_same(torch.tensor(read[name].to_numpy()), expected)
    pytest.importorskip("pandas")
    frame = read.to_pandas()
    assert len(frame) == SAMPLES
    assert frame.aum.isna().sum() == int(dynamics.aum.isnan().sum()) > 0
    assert frame.dtypes["count"] == "int32" and frame.dtypes["learnt"] == "bool"


def test_every_attribute_has_a_column():
    attributes = {
        name
        for kind in TrainingDynamics.__mro__
        for name, value in vars(kind).items()
        if isinstance(value, property)
    }
    assert attributes - {"device", "num_updates", "num_nonfinite"} == set(data_map.COLUMNS)
