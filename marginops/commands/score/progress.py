"""The progress of ``marginops score`` on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from .. import console

# Seconds between two lines where standard error is no terminal.
_INTERVAL = 10.0
_NUMBERS = "{n_fmt} of {total_fmt} rows, {rate_fmt}{postfix}, {remaining} left"


class Progress:
    """Counts rows and bytes, and shows how many, how fast, and for how long still.

    On a terminal it is a bar. Elsewhere it is a line every ten seconds. Rates begin with the first
    batch, before which the workers start.

    Attributes:
        rows: The rows that this process scored, without those of earlier runs.
        bytes: The bytes of the columns that it read.
    """

    def __init__(self, select: int | None = None, *, quiet: bool) -> None:
        """Make a progress, whose clock does not run yet.

        Args:
            select: The number of rows to select, if rows are selected.
            quiet: Show nothing.
        """
        self.rows = self.bytes = 0
        self._select, self._quiet = select or 0, quiet
        self._start = self._shown = time.monotonic()
        self._end: float | None = None
        self._total = self._finished = 0
        # The rows and bytes of the first batch, and when it was scored.
        self._first = (0, 0, self._start)
        self._bar: Any = None

    def start(self, total: int, finished: int, share: int) -> None:
        """Start the clock.

        Args:
            total: The number of rows of the run.
            finished: The number of rows that earlier runs scored.
            share: The number of rows that this process will score.
        """
        self._start = time.monotonic()
        self._total, self._finished = finished + share, finished
        if self._select > total and not self._quiet:
            console.fail(
                f"--select {self._select} asks for more than the {total:,} rows; all are selected"
            )
        if finished and not self._quiet:
            console.fail(f"resumed: {finished:,} of {total:,} rows are scored already")

    @property
    def seconds(self) -> float:
        """The seconds from the start to the end, or until now."""
        return (self._end or time.monotonic()) - self._start

    @property
    def rates(self) -> tuple[float, float] | None:
        """Rows and bytes a second after the first batch; None if there was no second one."""
        rows, num_bytes, begin = self._first
        if self.rows == rows:
            return None
        seconds = max((self._end or time.monotonic()) - begin, 1e-9)
        return (self.rows - rows) / seconds, (self.bytes - num_bytes) / seconds

    def __call__(self, rows: int, num_bytes: int) -> None:
        """Add rows that are scored, and the bytes that were read for them."""
        if self.rows == 0:
            self._begin(rows, num_bytes)
            return
        self.rows += rows
        self.bytes += num_bytes
        if self._quiet:
            return
        if not self._bar.disable:
            self._bar.set_postfix_str(self._byte_rate(), refresh=False)
            self._bar.update(rows)
        elif time.monotonic() - self._shown >= _INTERVAL:
            self._shown = time.monotonic()
            console.fail(self._line())

    def close(self) -> None:
        """Stop the clock, leave the bar as it is, and go to a new line."""
        self._end = time.monotonic()
        if self._bar is not None:
            self._bar.close()

    def _begin(self, rows: int, num_bytes: int) -> None:
        self.rows, self.bytes = rows, num_bytes
        self._shown = time.monotonic()
        self._first = rows, num_bytes, self._shown
        self._bar = tqdm(
            total=self._total,
            initial=self._finished + rows,
            unit=" rows",
            unit_scale=True,
            smoothing=0,
            dynamic_ncols=True,
            disable=self._quiet or not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| " + _NUMBERS,
        )

    def _line(self) -> str:
        rows, _, begin = self._first
        return str(
            tqdm.format_meter(
                self._finished + self.rows,
                self._total,
                time.monotonic() - begin,
                unit=" rows",
                unit_scale=True,
                initial=self._finished + rows,
                postfix=self._byte_rate(),
                bar_format=_NUMBERS,
            )
        )

    def _byte_rate(self) -> str:
        _, rate = self.rates or (0.0, 0.0)
        return f"{tqdm.format_sizeof(rate)}B/s"
