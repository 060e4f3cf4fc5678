"""The page of what could be reproduced, made of the results of the claims."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def page(claims, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return claims("claims_page")


def test_the_page_has_the_claims_with_results(claims, page, monkeypatch, tmp_path) -> None:
    harness = claims("harness.claim")

    def report(rows):
        outcome = "confirmed" if rows[0]["gain"] > 1 else "not confirmed"
        return harness.Report(outcome, f"It gains {rows[0]['gain']} times.", [])

    measured = harness.Claim(
        *("toy_claim", "Less than 1 % of toys", "Toys gain.", "Author 2020", "Runs of toys."),
        *(list, dict, report, print),
    )
    missing = replace(measured, name="other_claim", title="Others")
    monkeypatch.setattr(claims("catalogue"), "CLAIMS", [measured, missing])
    row = {"seed": 0, "gain": 1.5, "cpu_seconds": 90.0}
    result = {"processor": "a processor", "torch": "2", "date": "today", "rows": [row]}
    (tmp_path / "claims-toy-claim.json").write_text(json.dumps(result))

    line = "| [Less than 1 % of toys](#less-than-1--of-toys) | Author 2020 | confirmed |"
    assert page.overview_of_claims(tmp_path).splitlines()[2:] == [line]
    text = page.sections_of_claims(tmp_path)
    assert text.startswith("## Less than 1 % of toys\n\n**Claim** (Author 2020): Toys gain.\n")
    assert "**Confirmed.** It gains 1.5 times." in text
    assert "(../benchmarks/results/claims-toy-claim.png)" in text
    assert "1 runs, 2 minutes of one thread of a processor, torch 2, today" in text


def test_every_claim_is_in_the_catalogue(claims) -> None:
    folder = BENCHMARKS / "claims"
    named = {path.stem for path in folder.glob("*.py") if "\nCLAIM = Claim(" in path.read_text()}
    assert {claim.name for claim in claims("catalogue").CLAIMS} == named


def test_every_claim_has_all_its_results_and_a_figure(claims) -> None:
    for claim in claims("catalogue").CLAIMS:
        result = BENCHMARKS / "results" / claim.result_file
        assert result.with_suffix(".png").is_file(), claim.name
        rows, settings = json.loads(result.read_text())["rows"], claim.all_settings()
        assert len(rows) >= len(settings), claim.name  # without cleanlab there are fewer settings
        for name in ("data", "seed"):
            assert {row[name] for row in rows} >= {one[name] for one in settings}, claim.name
