"""Runs the command ``marginops`` for ``python -m marginops``."""

import sys

from .commands.cli import main

sys.exit(main())
