"""The command line: ``marginops doctor``, ``demo``, ``observe``, ``report``, ``score``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import _native
from .._version import __version__
from . import console, doctor
from .demo import run as demo
from .observe import run as observe
from .report import run as report
from .score import arguments as score_arguments
from .score import run as score


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    return console.guard(lambda: _main(arguments))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        console.fail(f"{self.prog}: {message}; see {self.prog} --help")
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse hides that the help or the version cannot be written.
        if file is sys.stdout:
            console.say(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


def _main(arguments: Sequence[str] | None) -> int:
    parser = _Parser(
        prog="marginops",
        description="The command line: marginops doctor, demo, observe, report and score.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    described = "show which kernels this machine uses, and why it does not use better ones"
    command = commands.add_parser("doctor", help=described, description=described)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--no-build", action="store_true", help="compile nothing")
    command.set_defaults(run=_doctor)

    described = "train on real data with and without selection, and compare the results"
    command = commands.add_parser("demo", help=described, description=described)
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    described = "train on real data and watch margins, neural collapse and class manifolds"
    command = commands.add_parser("observe", help=described, description=described)
    observe.add_arguments(command)
    command.set_defaults(run=observe.run)

    described = "write one HTML file about a training that RunRecorder recorded"
    command = commands.add_parser("report", help=described, description=described)
    report.add_arguments(command)
    command.set_defaults(run=report.run)

    described = "score the rows of Parquet files, and select the rows to label or to train on"
    command = commands.add_parser("score", help=described, description=described)
    score_arguments.add_arguments(command)
    command.set_defaults(run=score.run)

    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.report(_native.loader, build=not options.no_build)
    console.say(json.dumps(found, indent=2) if options.json else doctor.text(found))
    return 0
