"""Results as scalars for loggers, wrappers of torchmetrics, plots, and the import in a notebook."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.wrappers import (
    BootStrapper,
    ClasswiseWrapper,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
)

from marginops.metrics import ClassManifolds, MarginDistribution, NeuralCollapse
from marginops.ops.margin import classification_margin

INPUT = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
TARGET = torch.arange(30) % 3
METRICS = {
    "margins": (lambda: MarginDistribution(quantiles=[0.05, 0.5], decades=2), (INPUT[:, 0],)),
    "manifolds": (lambda: ClassManifolds(3, 4), (INPUT, TARGET)),
    "collapse": (lambda: NeuralCollapse(3, 4), (INPUT, TARGET)),
}
ONE_VALUE = {"margins": "quantile_0.5", "manifolds": "mean_radius", "collapse": "nc1"}


def updated(name):
    make, batch = METRICS[name]
    metric = make()
    metric.update(*batch)
    return metric


@pytest.mark.parametrize("name", METRICS)
def test_scalars_are_0_d(name):
    scalars = updated(name).compute().scalars()
    assert all(type(key) is str and value.shape == () for key, value in scalars.items())
    # Every value is also a metric by itself.
    for key, value in scalars.items():
        torch.testing.assert_close(updated(name)[key].compute(), value, equal_nan=True)


def test_scalars_of_margins():
    metric = updated("margins")
    summary = metric.compute()
    expected = {key: getattr(summary, key) for key in summary._fields[:8]}
    expected |= {"quantile_0.05": summary.quantiles[0], "quantile_0.5": summary.quantiles[1]}
    expected |= {f"support_vectors_{i}": summary.support_vectors[i - 1] for i in (1, 2)}
    for same in (summary, pickle.loads(pickle.dumps(summary)), copy.deepcopy(summary)):
        assert same.scalars() == expected
    assert list(metric(INPUT[:, 1]).scalars()) == list(expected)
    with pytest.raises(ValueError, match=r"summary: expected a result of MarginDistribution.comp"):
        summary._replace(mean=summary.mean).scalars()


def test_scalars_of_manifolds():
    metric = ClassManifolds(4, 4)
    metric.update(INPUT, TARGET)  # class 3 has no samples
    summary = metric.compute()
    scalars = summary.scalars()
    assert scalars["samples"] == 30
    torch.testing.assert_close(scalars["mean_radius"], summary.radius[:3].mean())
    pairs = summary.distance[:3, :3][~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(scalars["mean_distance"], pairs.mean())
    one = ClassManifolds(2, 4)
    one.update(INPUT, torch.zeros_like(TARGET))
    assert one.compute().scalars()["mean_distance"].isnan()
    nan = INPUT.clone()
    nan[0] = torch.nan
    one.update(nan, torch.zeros_like(TARGET))
    assert one.compute().scalars()["mean_radius"].isnan()


@pytest.mark.parametrize("name", METRICS)
def test_names_of_values(name):
    metric = updated(name)
    with pytest.raises(ValueError, match=r"idx: expected one of .*, got 'accuracy'"):
        metric["accuracy"]
    field = metric.compute()._fields[1]
    for entry in (metric[field], pickle.loads(pickle.dumps(metric[field])), metric[1]):
        torch.testing.assert_close(entry.compute(), metric.compute()[1])
    assert field in repr(metric[field])


@pytest.mark.parametrize("name", METRICS)
def test_wrappers_take_one_value(name):
    make, batch = METRICS[name]
    bootstrap = BootStrapper(make()[ONE_VALUE[name]], num_bootstraps=5, raw=True)
    bootstrap.update(*batch)
    assert bootstrap.compute()["raw"].shape == (5,)
    extremes = MinMaxMetric(make()[ONE_VALUE[name]])
    expected = updated(name)[ONE_VALUE[name]].compute()
    extremes.update(*batch)
    assert extremes.compute() == {"raw": expected, "min": expected, "max": expected}
    tracker = MetricTracker(make()[ONE_VALUE[name]], maximize=True)
    for scale in (1, 3, 2):
        tracker.increment()
        tracker.update(batch[0] ** scale, *batch[1:])
    assert tracker.compute_all().shape == (3,)
    assert tracker.best_metric() == tracker.compute_all().max()


def test_wrappers_take_a_vector():
    radii = ClasswiseWrapper(ClassManifolds(3, 4)["radius"], labels=["a", "b", "c"], prefix="r_")
    radii.update(INPUT, TARGET)
    expected = dict(zip(("r_a", "r_b", "r_c"), updated("manifolds").compute().radius, strict=True))
    assert radii.compute() == expected
    outputs = MultioutputWrapper(MarginDistribution()["mean"], num_outputs=4)
    outputs.update(INPUT)
    torch.testing.assert_close(outputs.compute(), INPUT.double().mean(0))


@pytest.mark.parametrize("name", METRICS)
def test_wrappers_refuse_a_whole_result(name):
    make, batch = METRICS[name]
    kind = type(updated(name).compute()).__name__
    bootstrap, extremes = BootStrapper(make(), num_bootstraps=2), MinMaxMetric(make())
    for wrapper, error in ((bootstrap, TypeError), (extremes, RuntimeError)):
        wrapper.update(*batch)
        with pytest.raises(error, match=kind):
            wrapper.compute()


def test_collection_as_one_dictionary():
    metrics = MetricCollection({"manifolds": ClassManifolds(3, 4), "nc": NeuralCollapse(3, 4)})
    metrics.update(INPUT, TARGET)
    scalars = {
        f"{name}_{key}": value
        for name, summary in metrics.compute().items()
        for key, value in summary.scalars().items()
    }
    assert {"manifolds_mean_radius", "nc_nc1"} < scalars.keys()
    assert len(scalars) == 10


def test_lightning_logs_metrics_and_scalars(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is missing")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)
            self.margins = MarginDistribution(exact=True)
            self.collapse = NeuralCollapse(3, 4)["nc1"]
            self.both = MetricCollection([ClassManifolds(3, 4), NeuralCollapse(3, 4)])
            self.named = MetricCollection({"radius": ClassManifolds(3, 4)["mean_radius"]})

        def training_step(self, batch, index):
            input, target = batch
            logits = self.layer(input)
            self.margins.update(classification_margin(logits, target))
            for metric in (self.collapse, self.both, self.named):
                metric.update(input, target)
            # Lightning computes and resets these at the end of the epoch.
            self.log("nc1", self.collapse, on_step=False, on_epoch=True)
            self.log_dict(self.named, on_step=False, on_epoch=True)
            return torch.nn.functional.cross_entropy(logits, target)

        def on_train_epoch_end(self):
            self.log_dict(self.margins.compute().scalars())
            for name, summary in self.both.compute().items():
                self.log_dict({f"{name}/{key}": each for key, each in summary.scalars().items()})
            self.margins.reset()
            self.both.reset()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(INPUT, TARGET)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=10))
    logged = trainer.callback_metrics
    assert {"quantile_0.05", "support_vectors_3"} < logged.keys()
    # Two epochs that were not reset would count 60.
    assert logged["count"] == logged["ClassManifolds/samples"] == 30
    nc1, radius = updated("collapse")["nc1"], updated("manifolds")["mean_radius"]
    for key, expected in (("nc1", nc1), ("NeuralCollapse/nc1", nc1), ("radius", radius)):
        torch.testing.assert_close(logged[key].double(), expected.compute(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logged["ClassManifolds/mean_radius"], logged["radius"])
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"state_dict: expected .*the metric margins"):
        model.load_state_dict(
            {**model.state_dict(), "margins.counts": -torch.ones(2, dtype=torch.int64)}
        )


@pytest.mark.parametrize("name", ["manifolds", "collapse"])
def test_plots(name, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = updated(name)
    summary = metric.compute()
    values = list(summary.radius if name == "manifolds" else summary)
    figure, ax = metric.plot()
    assert ax.get_figure() is figure
    for bar, value in zip(ax.patches, values, strict=True):
        assert bar.get_height() == pytest.approx(float(value), nan_ok=True)
    assert metric.plot(summary, ax=ax)[1] is ax
    batch = METRICS[name][1]
    later = metric(batch[0] * 2 + 1, *batch[1:])
    _, steps = metric.plot([summary, later])
    series = [list(s.radius if name == "manifolds" else s) for s in (summary, later)]
    for index, line in enumerate(steps.lines):
        expected = [float(values[index]) for values in series]
        assert line.get_ydata().tolist() == pytest.approx(expected, nan_ok=True)
    assert len(steps.lines) == len(values)
    collection = MetricCollection({"one": metric})
    assert len(collection.plot()) == 1
    pyplot.close("all")
    for wrong, error in (([], ValueError), ([1], TypeError), (3, TypeError)):
        with pytest.raises(error, match="val: expected"):
            metric.plot(wrong)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        metric.plot()


@pytest.mark.parametrize("arguments", [(INPUT, TARGET), (INPUT,), (INPUT[:, 0], TARGET)], ids=len)
def test_logits_are_no_margins(arguments):
    metric = updated("margins")
    with pytest.raises(
        (TypeError, ValueError), match=r"margins: expected .*pass marginops.classification_margin"
    ):
        metric.update(*arguments)
    assert metric.compute().count == 30


@pytest.mark.parametrize("backend", ["matplotlib_inline_x.backend_inline", "", ".a"])
def test_backend_of_a_notebook_that_is_missing(backend):
    backend = f"module://{backend}"
    script = (
        "import os, torch, marginops.metrics as metrics\n"
        "metric = metrics.ClassManifolds(2, 1)\n"
        "metric.update(torch.ones(2, 1), torch.tensor([0, 1]))\n"
        "try:\n"
        "    import matplotlib\n"
        "except ModuleNotFoundError: pass\n"
        "else:\n"
        "    metric.plot()\n"
        "assert os.environ['MPLBACKEND'] == os.environ['EXPECTED']\n"
    )
    environment = os.environ | {"MPLBACKEND": backend, "EXPECTED": backend}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_backend_that_exists_is_used(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "own_backend.py").write_text("from matplotlib.backends.backend_agg import *\n")
    script = (
        "import marginops.metrics, matplotlib.pyplot as pyplot\n"
        "pyplot.figure()\n"
        "assert pyplot.get_backend() == 'module://own_backend'\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"MPLBACKEND": "module://own_backend", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
