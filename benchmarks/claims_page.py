"""The page of what could be reproduced, made of the results of ``claims/``."""

import json
import re
import sys
from pathlib import Path
from typing import Any

CLAIMS = Path(__file__).with_name("claims")


def overview_of_claims(folder: Path) -> str:
    """A line for each claim: what it is, whose it is, and whether it held."""
    lines = ["| Claim | Source | Outcome |", "|---|---|---|"]
    for claim, result in _measured(folder):
        outcome = claim.report(result["rows"]).outcome
        anchor = re.sub(r"[^a-z0-9 -]", "", claim.title.lower()).replace(" ", "-")
        lines.append(f"| [{claim.title}](#{anchor}) | {claim.source} | {outcome} |")
    return "\n".join(lines)


def sections_of_claims(folder: Path) -> str:
    """Of each claim the statement, the verdict, the tables, the figure and the protocol."""
    return "\n\n".join(_section(claim, result) for claim, result in _measured(folder))


def finding_of_claim(path: Path) -> str:
    """A claim, its verdict and its first table, for the page of what it is about."""
    from_result = {claim.result_file: (claim, result) for claim, result in _measured(path.parent)}
    claim, result = from_result[path.name]
    from harness.page import table, verdict

    report = claim.report(result["rows"])
    parts = f"**Claim:** {claim.statement}", verdict(report), table(report.tables[0])
    return "\n\n".join(parts)


def _section(claim: Any, result: dict[str, Any]) -> str:
    from harness.page import markdown

    names = [Path(claim.result_file).with_suffix(".png"), claim.sheet_file]
    figures = [f"![{claim.title}](../benchmarks/results/{name})" for name in names if name]
    return markdown(claim, result, "\n\n".join(figures))


def _measured(folder: Path) -> list[tuple[Any, dict[str, Any]]]:
    """The claims with a result file, and what it holds."""
    sys.path.insert(0, str(CLAIMS))
    try:
        from catalogue import CLAIMS as claims
    finally:
        sys.path.remove(str(CLAIMS))
    files = [(claim, folder / claim.result_file) for claim in claims]
    return [(claim, json.loads(file.read_text())) for claim, file in files if file.exists()]
