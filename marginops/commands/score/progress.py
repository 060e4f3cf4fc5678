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

    On a terminal it is a bar. Elsewhere it is a line every ten seconds.

    Attributes:
        rows: The rows that this process scored, without those of earlier runs.
        bytes: The bytes of the columns that it read.
    """

    def __init__(self, num_processes: int, select: int | None = None, *, quiet: bool) -> None:
        """Make a progress, whose clock does not run yet.

        Args:
            num_processes: The number of processes of torchrun, which share the rows.
            select: The number of rows to select, if rows are selected.
            quiet: Show nothing.
        """
        self.rows = self.bytes = 0
        self._num_processes, self._select, self._quiet = num_processes, select or 0, quiet
        self._start = self._shown = time.monotonic()
        self._end: float | None = None
        self._total = self._finished = 0
        self._bar: Any = None

    def start(self, total: int, finished: int) -> None:
        """Start the clock.

        Args:
            total: The number of rows of the run.
            finished: The number of rows that earlier runs scored.
        """
        self._start = self._shown = time.monotonic()
        # Processes take tasks in turn, so the shares are about equal.
        self._total = finished + (total - finished) // self._num_processes
        self._finished = finished
        if self._select > total and not self._quiet:
            console.fail(
                f"--select {self._select} asks for more than the {total:,} rows; all are selected"
            )
        if finished and not self._quiet:
            console.fail(f"resumed: {finished:,} of {total:,} rows are scored already")
        self._bar = tqdm(
            total=self._total,
            initial=finished,
            unit=" rows",
            unit_scale=True,
            smoothing=0,
            dynamic_ncols=True,
            disable=self._quiet or not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| " + _NUMBERS,
        )

    @property
    def seconds(self) -> float:
        """The seconds from the start to the end, or until now."""
        return (self._end or time.monotonic()) - self._start

    def __call__(self, rows: int, num_bytes: int) -> None:
        """Add rows that are scored, and the bytes that were read for them."""
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
