"""The options of ``marginops score``, and the combinations of them that make no sense."""

from __future__ import annotations

import argparse

from ..options import UsageError, device, is_place, path, place, text, whole_number

# Copies, because the modules that define them need pyarrow.
STATISTICS = (
    *("margin", "rival", "top2_margin", "loss", "confidence", "entropy", "correct", "el2n"),
    *("gradient_norm", "prediction", "minimal_margin", "probability_margin"),
)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops score`` to its parser."""
    parser.add_argument(
        "files",
        type=text,
        nargs="+",
        metavar="FILES",
        help="Parquet files, folders of them, patterns such as 'part-*.parquet', or addresses such "
        "as s3://bucket/folder",
    )
    parser.add_argument(
        "--output",
        type=text,
        required=True,
        metavar="DIR",
        help="folder of the results; if a run was ended, the same command goes on with it",
    )
    _add_scores(parser.add_argument_group("what is scored"))
    _add_reductions(parser.add_argument_group("what is kept of all rows"))
    _add_workers(parser.add_argument_group("who does the work"))
    parser.add_argument(
        "--json", type=path, metavar="FILE", help="also write all numbers and times to this file"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_scores(group: argparse._ArgumentGroup) -> None:
    logits = group.add_mutually_exclusive_group(required=True)
    logits.add_argument(
        "--head",
        type=text,
        metavar="HEAD",
        help="the last layer, for a column of its inputs: a file of safetensors or torch.save, or "
        "MODULE:FUNCTION, a function of yours that returns it",
    )
    logits.add_argument(
        "--model",
        type=place,
        metavar="MODULE:FUNCTION",
        help="the network, for a column of its inputs: a function of yours that returns it",
    )
    logits.add_argument("--logits", action="store_true", help="the column holds logits")
    group.add_argument(
        "--layer",
        type=text,
        metavar="NAME",
        help="name of the layer in the file of --head, if the file has several",
    )
    group.add_argument(
        "--column",
        type=text,
        required=True,
        metavar="NAME",
        help="column of embeddings, logits or inputs of the network",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what numbers the bytes of a fixed_size_binary column are; lists say it themselves",
    )
    group.add_argument(
        "--target", type=text, metavar="NAME", help="column of the labels, whole numbers from 0 on"
    )
    group.add_argument(
        "--ignore-index",
        type=int,
        default=-100,
        metavar="N",
        help="the label of rows without a label, beside null (default: %(default)s)",
    )
    group.add_argument(
        "--id",
        type=text,
        metavar="NAME",
        help="column of integers or strings that name the rows in the results",
    )
    group.add_argument(
        "--statistics",
        type=text,
        nargs="+",
        metavar="NAME",
        help=f"what is computed of every row: all, or some of {', '.join(STATISTICS)} (default: "
        "margin with --target, else minimal_margin with --head, else top2_margin)",
    )


def _add_reductions(group: argparse._ArgumentGroup) -> None:
    count = whole_number(1)
    group.add_argument(
        "--select", type=count, metavar="K", help="the K rows with the smallest score"
    )
    group.add_argument(
        "--select-per-class",
        type=count,
        metavar="K",
        help="the K rows with the smallest score of each class: of each label with --target, else "
        "of each predicted class",
    )
    group.add_argument(
        "--by",
        type=text,
        metavar="NAME",
        help="the statistic to select by (default: the first of --statistics)",
    )
    group.add_argument(
        "--largest", action="store_true", help="select the rows with the largest score instead"
    )
    group.add_argument(
        "--label-issues",
        type=count,
        metavar="K",
        help="the K rows whose label is most suspicious, and which classes are confused",
    )
    group.add_argument(
        "--class-moments",
        action="store_true",
        help="number, mean and radius of the rows of every class",
    )
    group.add_argument(
        "--no-scores",
        dest="scores",
        action="store_false",
        help="do not write the scores of all rows",
    )


def _add_workers(group: argparse._ArgumentGroup) -> None:
    count = whole_number(1)
    group.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="number of processes (default: one for every two CPU cores, or for each GPU)",
    )
    group.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: processes of this machine; ray: a Ray cluster (default: %(default)s)",
    )
    group.add_argument(
        "--address",
        type=text,
        metavar="ADDRESS",
        help="address of the Ray cluster (default: that of RAY_ADDRESS, else Ray starts on this "
        "machine)",
    )
    group.add_argument(
        "--num-gpus",
        type=float,
        metavar="N",
        help="GPUs that Ray reserves for each worker (default: none)",
    )
    group.add_argument(
        "--task-rows",
        type=count,
        default=262_144,
        metavar="N",
        help="rows of a task, at least; a run that was ended repeats the tasks that it was at "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--batch-rows",
        type=count,
        metavar="N",
        help="rows that are scored at once (default: as many as 4 MiB hold, at most 65,536)",
    )


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: They do.
    """
    if options.layer is not None and (options.head is None or is_place(options.head)):
        raise UsageError(
            f"--layer: expected a file of --head that has several layers, got --layer "
            f"{options.layer} without such a file; leave it out"
        )
    if options.select is None and options.select_per_class is None:
        for name, is_given in (("--by", options.by is not None), ("--largest", options.largest)):
            if is_given:
                raise UsageError(
                    f"{name}: expected --select K or --select-per-class K with it, got neither; "
                    f"add one of them, or leave {name} out"
                )
    if options.target is None:
        for name, is_given in (
            ("--label-issues", options.label_issues is not None),
            ("--class-moments", options.class_moments),
        ):
            if is_given:
                raise UsageError(
                    f"{name}: expected labels, got no --target; name their column with --target"
                )
    if options.engine != "ray":
        for name, value in (("--address", options.address), ("--num-gpus", options.num_gpus)):
            if value is not None:
                raise UsageError(
                    f"{name}: expected --engine ray with it, got --engine {options.engine}; add "
                    f"--engine ray, or leave {name} out"
                )
