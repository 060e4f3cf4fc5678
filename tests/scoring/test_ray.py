"""The engine Ray on a cluster of two nodes: the bytes of the local engine, whatever happens."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.processes import alive, wait_until
from helpers.scoring_runs import WaitingScorer, digests, waiting
from marginops.scoring import (
    DataError,
    Margins,
    Moments,
    Scorer,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
    WorkerError,
    score_files,
)

ray = pytest.importorskip("ray")

from helpers.ray_runs import (  # noqa: E402
    CLASSES,
    WIDTH,
    BoundScorer,
    DeadlyScorer,
    add_node,
    parent,
    raylet,
    two_nodes,
    write_data,
)

pytestmark = pytest.mark.slow
ROWS, TASK_ROWS, TASKS = 6000, 900, 14  # rows of each of two files


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of features with labels and ids, and a head."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, files=2, rows=ROWS)
    return folder


def scorer(data: Path, kind: type[Scorer] = Scorer) -> Any:
    return kind(data / "head.safetensors", target="label", id="id", batch_rows=256)


def run(data: Path, output: Path, scorer: Scorer, **options: Any) -> Any:
    reductions = [Smallest(50), SmallestPerClass(5), Margins(), Moments(), SuspiciousLabels(20)]
    return score_files(data, scorer, output, reductions=reductions, task_rows=TASK_ROWS, **options)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run of the local engine."""
    output = tmp_path_factory.mktemp("local")
    summary = run(data, output, scorer(data), workers=1)
    assert summary["tasks"] == TASKS
    return digests(output)


def test_actors_give_the_bytes_of_the_local_engine(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    run(
        data,
        tmp_path / "run",
        scorer(data),
        engine="ray",
        workers=2,
        progress=lambda *done: calls.append(done),
    )
    assert digests(tmp_path / "run") == expected
    assert len(calls) == TASKS
    assert sum(rows for rows, _ in calls) == 2 * ROWS
    assert sum(size for _, size in calls) >= 2 * ROWS * WIDTH * 4


def test_tasks_that_cpus_read_for_gpus_give_the_bytes_of_the_local_engine(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    run(data, tmp_path / "run", scorer(data), engine="ray", num_gpus=0.5)
    assert digests(tmp_path / "run") == expected


def test_a_killed_actor_is_replaced(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    killed: list[int] = []

    def kill(rows: int, num_bytes: int) -> None:
        if not killed:
            wait_until(lambda: len(waiting(gate)) == 2)
            killed.append(waiting(gate)[0])
            os.kill(killed[0], signal.SIGKILL)
            (gate / "open").touch()

    waits = scorer(data, WaitingScorer).behind(gate, ROWS)
    run(data, tmp_path / "run", waits, engine="ray", workers=2, progress=kill)
    assert not alive(killed[0])
    assert digests(tmp_path / "run") == expected


def test_work_of_a_lost_node_is_done_by_others(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    node = add_node(cluster)
    lost: list[int] = []

    def lose(rows: int, num_bytes: int) -> None:
        if not lost:
            wait_until(lambda: any(parent(actor) == raylet(node) for actor in waiting(gate)))
            lost.extend(actor for actor in waiting(gate) if parent(actor) == raylet(node))
            cluster.remove_node(node, allow_graceful=False)
            (gate / "open").touch()

    waits = scorer(data, WaitingScorer).behind(gate, ROWS)
    try:
        run(data, tmp_path / "run", waits, engine="ray", workers=3, progress=lose)
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)
    assert lost
    assert digests(tmp_path / "run") == expected


def test_a_task_that_ends_its_process_each_time_ends_the_run(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    deadly = scorer(data, DeadlyScorer)
    deadly.first_row = ROWS
    with pytest.raises(WorkerError) as caught:
        run(data, tmp_path / "run", deadly, engine="ray", workers=2)
    message = str(caught.value)
    assert "got 4 that ended in task 7" in message
    assert str(data / "1.parquet") in message
    assert "\n" not in message

    # The local engine goes on where Ray was.
    begun = digests(tmp_path / "run")
    run(data, tmp_path / "run", scorer(data), workers=1)
    assert digests(tmp_path / "run") == expected
    assert begun.items() <= expected.items()


def test_a_job_that_actors_cannot_load_ends_the_run_in_one_line(
    cluster: Any, data: Path, tmp_path: Path
) -> None:
    bound = scorer(data, BoundScorer)
    bound.process = os.getpid()
    with pytest.raises(WorkerError) as caught:
        run(data, tmp_path / "run", bound, engine="ray", workers=1)
    message = str(caught.value)
    assert message.startswith("engine: expected Ray to run all tasks, got ActorDiedError: ")
    assert "No module named 'of_the_user'" in message
    assert "\n" not in message


def test_ray_goes_on_where_the_local_engine_was(
    cluster: Any, data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    done = 0

    def stop(rows: int, num_bytes: int) -> None:
        nonlocal done
        done += rows
        if done > ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run", scorer(data), workers=1, progress=stop)
    calls: list[int] = []
    run(
        data,
        tmp_path / "run",
        scorer(data),
        engine="ray",
        workers=1,
        progress=lambda rows, num_bytes: calls.append(rows),
    )
    assert 0 < len(calls) < TASKS
    assert digests(tmp_path / "run") == expected


@pytest.mark.parametrize("damage", ["label", "page"])
def test_an_error_of_the_data_is_that_of_the_local_engine(
    cluster: Any, data: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "0.parquet"
    options: dict[str, Any] = {"workers": 1}
    if damage == "label":
        rows = pq.read_table(data / "0.parquet")
        label = rows["label"].to_numpy().copy()
        label[2000] = CLASSES
        pq.write_table(rows.set_column(1, "label", pa.array(label)), file)
    else:
        # A process that reads for others finds it. The plan did not: the footer stays.
        whole = (data / "0.parquet").read_bytes()
        file.write_bytes(whole[:4] + bytes(50_000) + whole[50_004:])
        options["num_gpus"] = 0.5
    messages = []
    for engine in ({"workers": 1}, {"engine": "ray", **options}):
        with pytest.raises(DataError) as caught:
            score_files(file, scorer(data), tmp_path / f"run{len(messages)}", **engine)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{file}, row group 0: ")


def test_an_interrupt_ends_the_actors_and_leaves_the_cluster(
    cluster: Any, data: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def interrupt(rows: int, num_bytes: int) -> None:
        wait_until(lambda: len(waiting(gate)) == 2)
        raise KeyboardInterrupt

    waits = scorer(data, WaitingScorer).behind(gate, ROWS)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run", waits, engine="ray", workers=2, progress=interrupt)
    wait_until(lambda: not any(alive(process) for process in waiting(gate)))
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"address": "127.0.0.1:1"},
            ValueError,
            r"address: expected \S+, to which this process is connected, got 127.0.0.1:1; leave it",
        ),
        ({"num_gpus": 2}, ValueError, "num_gpus: expected at most the 1 of the cluster, got 2"),
        ({"num_gpus": 2, "workers": 1}, ValueError, "num_gpus: expected at most the 1 of the clus"),
        ({"num_cpus": 4}, ValueError, "num_cpus: expected at most the 2 of the cluster, got 4"),
        ({"num_cpus": 0}, ValueError, "num_cpus: expected more than 0"),
        ({"num_cpus": -1}, ValueError, "num_cpus: expected a number that is not negative, got -1"),
        ({"num_gpus": "1"}, TypeError, "num_gpus: expected a number, got str"),
        (
            {"num_gpus": 0.5, "num_cpus": 1},
            ValueError,
            "num_cpus: expected 2 actors to leave one of 2 CPUs for reading, got 1 for each",
        ),
    ],
)
def test_wrong_arguments(
    cluster: Any,
    data: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(data, tmp_path / "run", scorer(data), engine="ray", **options)
    assert ray.is_initialized()


def test_without_ray_the_error_names_the_extra(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "marginops.scoring.ray", raising=False)
    with pytest.raises(ImportError, match=r"needs ray\[data\]; run pip install .marginops\[ray\]"):
        run(data, tmp_path / "run", scorer(data), engine="ray")
