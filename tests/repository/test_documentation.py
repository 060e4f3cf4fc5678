"""The documentation is true: its examples run, its links lead somewhere, and nothing is missing."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import marginops

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
MODULES = ["marginops"] + [
    f"marginops.{name}"
    for name in ("homogeneity", "metrics", "networks", "nn", "norms", "scoring", "training")
]
HOSTS = "composer", "ignite", "lightning", "transformers"
MODULES += [f"marginops.integrations.{name}" for name in HOSTS]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


def examples(page: Path) -> list[str]:
    """The blocks of a page; one that does not import torch continues the one before."""
    joined: list[str] = []
    # The first two of the README take tensors that a reader has: they have a test of their own.
    for block in blocks(page)[2:] if page == README else blocks(page):
        if block.startswith("import torch\n"):
            joined.append(block)
        else:
            joined[-1] += block
    return joined


EXAMPLES = [
    pytest.param(example, id=f"{page.name}-{number}")
    for page in (README, *DOCS)
    for number, example in enumerate(examples(page))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # some examples write files
    exec(example, {})


def test_the_one_line_is_the_lines_it_replaces():
    before, after, *_ = blocks(README)
    names = {"marginops": marginops, "logits": torch.randn(640, 10), "weight": torch.randn(10, 32)}
    exec(before, names)
    scores, indices = names["scores"], names["indices"]
    exec(after, names)
    assert torch.equal(names["indices"], indices)
    torch.testing.assert_close(names["scores"], scores)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_readme_names_every_function():
    (section,) = re.findall(r"^## What there is\n(.*?)^## ", README.read_text(), re.S | re.M)
    named = re.findall(r"^\| `(\w+)` \|", section, re.M)
    functions = [name for name in marginops.__all__ if inspect.isfunction(getattr(marginops, name))]
    assert sorted(named) == sorted(functions)


@pytest.mark.parametrize("module", MODULES)
def test_reference_has_every_public_name(module: str):
    directives = r"^\.\. (?:auto)?(?:class|data|exception|function|module):: ([\w.]+)$"
    pages = "".join(page.read_text() for page in DOCS if page.parent.name == "api")
    documented = [pkgutil.resolve_name(name) for name in re.findall(directives, pages, re.M)]
    public = importlib.import_module(module)
    missing = [
        name
        for name in public.__all__
        if not any(getattr(public, name) is known for known in documented)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda path: path.name
)
def test_relative_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    run = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "html" / "api" / "margins.html").exists()


PACKAGE = Path(marginops.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples(module):
    names = {"torch": torch, "marginops": marginops}
    failed, attempted = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert attempted > 0
    assert failed == 0
