"""The command line: ``marginops doctor``, ``marginops demo`` and ``marginops observe``."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence

from .. import _native
from .._version import __version__
from . import doctor
from .demo import run as demo
from .observe import run as observe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="marginops", description=__doc__)
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

    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        # The exit status that a shell reports for a program ended by this signal.
        return 128 + signal.SIGINT
    return status


def _doctor(options: argparse.Namespace) -> int:
    report = doctor.report(_native.loader, build=not options.no_build)
    print(json.dumps(report, indent=2) if options.json else doctor.text(report))
    return 0
