"""The files that people expect in a repository agree with its code and with each other."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import marginops

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
CI = (ROOT / ".ci/run").read_text()
PAGES = sorted(path.name for path in ROOT.glob("*.md"))


def test_citation_describes_this_version() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert CITATION["version"] == marginops.__version__
    assert CITATION["license"] == "BSD-3-Clause"
    assert CITATION["authors"] == [{"name": "The marginops authors"}]
    assert CITATION["title"].startswith("marginops")
    assert "cite the papers" in CITATION["message"]
    assert CITATION["abstract"]


def test_citation_lists_the_papers_of_the_documentation() -> None:
    """A row of that page is ``| what | Family, Family (year), *title* |``."""
    rows = re.findall(
        r"\| ([^|]+) \((\d{4})\), \*(.+?)\* \|", (ROOT / "docs/papers.md").read_text()
    )
    documented = {title: (families.split(", "), int(year)) for families, year, title in rows}
    cited = {
        paper["title"]: ([author["family-names"] for author in paper["authors"]], paper["year"])
        for paper in CITATION["references"]
    }
    assert len(rows) == len(documented) > 0
    assert cited == documented


def tool(command: str) -> str:
    """A linter's name and subcommand, without its options and files."""
    words = shlex.split(command)
    return " ".join(words[:2] if words[1:] and words[1].isalpha() else words[:1])


def test_hooks_run_the_linters_of_ci() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    hooks = [tool(hook["entry"]) for hook in repository["hooks"]]

    commands = re.findall(r"\.venv/bin/(.+)", "\n".join(re.findall(r"^[^#].*", CI, re.M)))
    not_linters = {"pip", "python", "pytest", "sphinx-build"}
    linters = [tool(command) for command in commands if command.split()[0] not in not_linters]
    assert sorted(hooks) == sorted(linters)


def steps(job: str) -> list[dict]:
    return WORKFLOW["jobs"][job]["steps"]


def test_workflow_runs_what_contributors_run() -> None:
    assert [step["run"] for step in steps("pinned") if "run" in step] == [".ci/run"]
    (pinned,) = [
        step["with"]["python-version"] for step in steps("pinned") if "python" in str(step)
    ]
    assert pinned == "3.11"

    *_, last = steps("newest")
    search = re.search(r"grep -m 1 '(.*?)' README\.md", last["run"])[0]
    assert search in CI
    pattern = search.split("'")[1]
    assert re.search(pattern, (ROOT / "README.md").read_text())


def test_workflow_may_only_read() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    for job in WORKFLOW["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
        checkout = job["steps"][0]
        assert checkout["uses"].startswith("actions/checkout@")
        assert checkout["with"]["persist-credentials"] is False


def test_changelog_names_everything_that_the_package_offers() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)", text, re.M) == ["Unreleased"]
    offered = [name for name in marginops.__all__ if not name.startswith("__")]
    offered = [name for name in offered if not inspect.ismodule(getattr(marginops, name))]
    assert [name for name in offered if f"`{name}`" not in text] == []


def test_security_page_names_every_variable_that_builds_read() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    # recipe.py reads no variable. It names macros.
    files = set((ROOT / "marginops/_native").glob("*.py")) - {ROOT / "marginops/_native/recipe.py"}
    code = "\n".join(file.read_text() for file in [*files, ROOT / "setup.py"])
    variables = set(re.findall(r'"([A-Z]{2,}(?:_[A-Z]+)*)"', code))
    harmless = {"MARGINOPS_VERBOSE", "LC_ALL"}  # builds set the second
    harmless |= {"GCC", "SOABI"}  # no variables
    assert {"MARGINOPS_CACHE_DIR", "CXX", "CUDA_HOME", "HOME"} <= variables
    assert {name for name in variables - harmless if f"`{name}" not in text} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_test_command_collects_every_test_file() -> None:
    """Pytest leaves out folders with some names, such as ``build``, unless it is told not to."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    collected = {line.partition("::")[0] for line in listed.splitlines() if "::" in line}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("**/test_*.py")}
    assert collected == files
