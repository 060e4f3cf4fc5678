"""What ``scoring.py`` measures, each in a process of its own: our command and its rivals.

python benchmarks/claims/scoring_jobs.py JOB < arguments.json

prints the seconds of the job without the imports, as JSON. Jobs that select write the ids that
they choose, in ascending order, to ``chosen.npy`` in their folder of outputs.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from scoring_data import COLUMNS, FEATURES, cores, head

Arguments = dict[str, Any]
PRODUCT_ROWS = 4096  # of a product, out of a buffer of 65,536 rows


def read_with_one_thread(arguments: Arguments) -> None:
    """iter_batches of pyarrow with one thread."""
    _read(arguments["files"])


def _read(files: list[str], part: int = 0, parts: int = 1) -> None:
    pa.set_cpu_count(1)
    groups = [
        (path, group) for path in files for group in range(pq.read_metadata(path).num_row_groups)
    ]
    for path, group in groups[part::parts]:
        batches = pq.ParquetFile(path).iter_batches(
            65_536, row_groups=[group], columns=COLUMNS, use_threads=False
        )
        for _ in batches:
            pass


def read_with_processes(arguments: Arguments) -> None:
    """The same in one process a core, each of which reads every second row group."""
    _in_processes(_read, arguments["files"])


def read_with_scanner(arguments: Arguments) -> None:
    """The dataset scanner of pyarrow, which reads and decodes with all threads."""
    for _ in ds.dataset(arguments["files"]).to_batches(columns=COLUMNS):
        pass


def multiply_with_one_thread(arguments: Arguments) -> None:
    """The bare product of float32 features and the head, without any reading."""
    _multiply(arguments["rows"])


def multiply_with_threads(arguments: Arguments) -> None:
    """The same with one thread a core."""
    _multiply(arguments["rows"], threads=cores())


def multiply_with_processes(arguments: Arguments) -> None:
    """The same with one process a core, of one thread each."""
    _in_processes(_multiply, arguments["rows"])


def _multiply(rows: int, part: int = 0, parts: int = 1, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    tiles = torch.randn(65_536, FEATURES).split(PRODUCT_ROWS)
    weight, bias = head()
    for tile in range(-(-rows // PRODUCT_ROWS // parts)):
        torch.addmm(bias, tiles[tile % len(tiles)], weight.T)


def _in_processes(function: Callable[..., None], argument: Any) -> None:
    context = multiprocessing.get_context("fork")  # nothing has started a thread yet
    parts = cores()
    processes = [
        context.Process(target=function, args=(argument, part, parts)) for part in range(parts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")


def score(
    arguments: Arguments,
    target: str | None = None,
    statistics: tuple[str, ...] | None = None,
    by: str | None = None,
    **options: Any,
) -> None:
    """``score_files`` with its default number of workers."""
    from marginops.scoring import Scorer, Smallest, score_files

    scorer = Scorer(arguments["head"], target=target, id="id", statistics=statistics)
    reductions = [Smallest(arguments["k"], by=by)]
    score_files(arguments["files"], scorer, arguments["output"], reductions=reductions, **options)


def score_margin(arguments: Arguments) -> None:
    """By the margin of the label."""
    score(arguments, "label")


def score_margin_alone(arguments: Arguments) -> None:
    """By the margin of the label; the scores of all rows are not written."""
    score(arguments, "label", scores=False)


def score_minimal_margin(arguments: Arguments) -> None:
    """By the minimal margin score, which needs no labels."""
    score(arguments)


def score_all_statistics(arguments: Arguments) -> None:
    """By the margin; all statistics are computed and written."""
    from marginops.scoring.statistics import STATISTICS

    score(arguments, "label", statistics=STATISTICS, by="margin")


def score_with_ray(arguments: Arguments) -> None:
    """By the margin, on a Ray cluster that starts and ends with the job."""
    score(arguments, "label", engine="ray")


def command(arguments: Arguments) -> None:
    """``marginops score``, with its figure."""
    from marginops.commands.cli import main

    status = main(
        [
            *("score", *arguments["files"], "--output", arguments["output"], "--quiet"),
            *("--head", arguments["head"], "--column", "embedding", "--id", "id"),
            *("--target", "label", "--select", str(arguments["k"])),
        ]
    )
    if status:
        raise RuntimeError(f"marginops score ended with {status}")


def torch_topk_at_the_end(arguments: Arguments) -> np.ndarray:
    """A loop of PyTorch over iter_batches that keeps all margins and ids."""
    scores, ids = [], []
    for margin, own_ids in _margins(arguments["files"]):
        scores.append(margin)
        ids.append(own_ids)
    chosen = torch.cat(scores).topk(arguments["k"], largest=False).indices
    return torch.cat(ids)[chosen].numpy()


def torch_running_topk(arguments: Arguments) -> np.ndarray:
    """The same loop, which keeps the k best so far."""
    k = arguments["k"]
    best, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for margin, own_ids in _margins(arguments["files"]):
        best, ids = torch.cat([best, margin]), torch.cat([ids, own_ids])
        best, places = best.topk(min(k, len(best)), largest=False)
        ids = ids[places]
    return ids.numpy()


def _margins(files: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    weight, bias = head()
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(columns=COLUMNS):
            values = batch["embedding"].flatten().to_numpy()
            features = torch.tensor(values).view(-1, FEATURES).float()
            target = torch.tensor(batch["label"].to_numpy()).long()[:, None]
            logits = F.linear(features, weight, bias)
            own = logits.gather(1, target).squeeze(1)
            rival = logits.scatter(1, target, -torch.inf).amax(1)
            yield own - rival, torch.tensor(batch["id"].to_numpy())


def pandas_and_numpy(arguments: Arguments) -> np.ndarray:
    """pandas.read_parquet and NumPy."""
    import pandas as pd

    frame = pd.read_parquet(arguments["files"], columns=COLUMNS)
    weight, bias = (value.numpy() for value in head())
    features = np.stack(frame["embedding"].to_numpy()).astype(np.float32)
    logits = features @ weight.T + bias
    rows, labels = np.arange(len(frame)), frame["label"].to_numpy()
    own = logits[rows, labels]
    logits[rows, labels] = -np.inf
    margin = own - logits.max(1)
    return frame["id"].to_numpy()[np.argpartition(margin, arguments["k"] - 1)[: arguments["k"]]]


JOBS: dict[str, Callable[[Arguments], np.ndarray | None]] = {
    job.__name__: job
    for job in (
        read_with_one_thread,
        read_with_processes,
        read_with_scanner,
        multiply_with_one_thread,
        multiply_with_threads,
        multiply_with_processes,
        score_margin,
        score_margin_alone,
        score_minimal_margin,
        score_all_statistics,
        score_with_ray,
        command,
        torch_topk_at_the_end,
        torch_running_topk,
        pandas_and_numpy,
    )
}


def main() -> None:
    job, arguments = JOBS[sys.argv[1]], json.load(sys.stdin)
    is_ours = job is command or job.__name__.startswith("score")
    if is_ours:
        import marginops.commands.cli
        import marginops.scoring  # noqa: F401  so that the imports are not part of the time
    elif job is pandas_and_numpy:
        import pandas  # noqa: F401
    start = time.perf_counter()
    chosen = job(arguments)
    seconds = time.perf_counter() - start
    output = Path(arguments["output"])
    if is_ours:
        chosen = pq.read_table(output / "selection.parquet")["id"].to_numpy()
    if chosen is not None:
        output.mkdir(parents=True, exist_ok=True)
        np.save(output / "chosen.npy", np.sort(chosen))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
