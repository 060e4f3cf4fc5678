"""What steps, hosts and scoring cost: these benchmarks run, and say what was measured."""

import json
import os
import re
import sys
import warnings

import pytest
import torch


def test_step_overhead(claims, capsys, monkeypatch) -> None:
    module = claims("step_overhead")
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "SAMPLES", 1280)
    monkeypatch.setattr("sys.argv", ["step_overhead.py", "--rounds", "2"])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    assert "step with dynamics and sampler: " in capsys.readouterr().out


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
