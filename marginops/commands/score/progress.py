"""The progress of ``marginops score`` on standard error."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .. import console

# Seconds between two lines where standard error is no terminal.
_INTERVAL = 10.0
_NUMBERS = "{n_fmt} of {total_fmt} rows, {rate_fmt}{postfix}, {remaining} left"


class Progress:
    """Counts rows and bytes, and shows how many, how fast, and for how long still.

    On a terminal it is a bar. Elsewhere it is a line every ten seconds.

    Attributes:
        rows: The rows that this process scored, without those of earlier runs.
        bytes: The bytes of the columns that it read.
        seconds: The seconds since the start.
    """

    def __init__(self, total: int, finished: int, *, quiet: bool) -> None:
        """Start the clock.

        Args:
            total: The number of rows of the run.
            finished: The number of rows that earlier runs scored.
            quiet: Show nothing.
        """
        self.rows = self.bytes = 0
        self._total, self._finished = total, finished
        self._start = self._shown = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._prints = not quiet and not on_terminal
        self._bar = tqdm(
            total=total,
            initial=finished,
            unit=" rows",
            unit_scale=True,
            smoothing=0,
            dynamic_ncols=True,
            disable=quiet or not on_terminal,
            bar_format="{percentage:3.0f}%|{bar}| " + _NUMBERS,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, rows: int, num_bytes: int) -> None:
        """Add rows that are scored, and the bytes that were read for them."""
        self.rows += rows
        self.bytes += num_bytes
        self._bar.set_postfix_str(self._byte_rate(), refresh=False)
        self._bar.update(rows)
        if self._prints and time.monotonic() - self._shown >= _INTERVAL:
            self._shown = time.monotonic()
            console.fail(self._line())

    def close(self) -> None:
        """Leave the bar as it is, and continue on a new line."""
        self._bar.close()

    def _line(self) -> str:
        return str(
            tqdm.format_meter(
                self._finished + self.rows,
                self._total,
                self.seconds,
                unit=" rows",
                unit_scale=True,
                initial=self._finished,
                postfix=self._byte_rate(),
                bar_format=_NUMBERS,
            )
        )

    def _byte_rate(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        return f"{tqdm.format_sizeof(rate)}B/s"
