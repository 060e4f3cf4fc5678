"""Makes ``python -m marginops`` the same as the command ``marginops``."""

import sys

from .commands.cli import main

sys.exit(main())
