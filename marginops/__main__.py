"""Makes ``python -m marginops`` the same as the command ``marginops``."""

import sys

from .cli import main

sys.exit(main())
