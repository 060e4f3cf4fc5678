"""Compiles one native library. This script runs in its own process and does not import marginops.

It reads one line of JSON from standard input: ``python_path``, and the arguments of
``torch.utils.cpp_extension.load``. That function also imports the library that it has built. So a
library that does not load is a failed build. The end of standard input means that the parent
process has ended. Then the script and the compiler processes end, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)


def main() -> None:
    """Run the build that standard input describes."""
    job = json.loads(sys.stdin.readline())
    sys.path[:] = job["python_path"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from torch.utils.cpp_extension import load

    try:
        load(**job["arguments"])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
