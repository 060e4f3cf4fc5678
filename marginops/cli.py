"""The command line: ``marginops doctor`` and ``marginops demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import _native
from ._native import doctor
from ._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="marginops", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    described = "tell which kernels are used here, and why not better ones"
    command = commands.add_parser("doctor", help=described, description=described)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--no-build", action="store_true", help="compile nothing")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("demo", help="train with and without selection on real data")
    if arguments[:1] == ["demo"]:
        # Only now, since its packages are an extra.
        try:
            from . import demo
        except ModuleNotFoundError as error:
            parser.error(f"the demo needs {error.name}: pip install 'marginops[demo]'")
        demo.add_arguments(command)
        command.set_defaults(run=demo.run)

    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _doctor(options: argparse.Namespace) -> int:
    report = doctor.report(_native.loader, build=not options.no_build)
    print(json.dumps(report, indent=2) if options.json else doctor.text(report))
    return 0
