"""The contents of the wheel and the source distribution, and their installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import marginops
from helpers.native_sources import write_program, write_tiny
from marginops._native import recipe

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = {".ci", ".clang-format", ".github", ".pre-commit-config.yaml"}
SELECT = (
    "import torch, marginops; print(marginops.__file__);"
    "print(marginops.select_smallest(torch.tensor([3.0, 1.0, 2.0]), 2).indices.tolist());"
    "from marginops import _native; print(_native.loader.outcome('cpu').implementation)"
)


def run(command: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unwanted(folder: str, names: list[str]) -> set[str]:
    """Names that are not part of the repository: output, environments, caches."""
    left_out = {name for name in names if name in ("__pycache__", "_build")}
    left_out |= {name for name in names if name.endswith((".egg-info", ".pyc", ".so"))}
    if Path(folder) == ROOT:
        left_out |= {name for name in names if name.startswith(".") and name not in HIDDEN}
        left_out |= {"build", "dist"}
    return left_out


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the original."""
    folder = tmp_path_factory.mktemp("tree") / "marginops"
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def build(tree: Path, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options]
    run([*command, "."], tree)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(tree, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def sources() -> set[str]:
    suffixes = (".h", ".cuh", ".cpp", ".cu")
    return {
        str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in suffixes
    }


def test_wheel_holds_python_and_sources_only(wheel: Path) -> None:
    assert wheel.name == f"marginops-{marginops.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"marginops/{name}" for name in sources()} <= names
    assert {
        "marginops/py.typed",
        "marginops/_native/ninja_file.py",
        "marginops/commands/cli.py",
    } <= names
    assert {Path(name).parts[0] for name in names} == {
        "marginops",
        f"marginops-{marginops.__version__}.dist-info",
    }
    package = [Path(name) for name in names if name.startswith("marginops/")]
    assert {path.suffix for path in package} <= {".py", ".typed", ".h", ".cuh", ".cpp", ".cu"}


def test_source_distribution_holds_the_repository(tree: Path, built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [".ci", ".github", "benchmarks", "csrc", "docs", "examples", "marginops", "tests"]
    files = [file for folder in folders for file in (tree / folder).rglob("*") if file.is_file()]
    repository = {str(file.relative_to(tree)) for file in files if "__pycache__" not in file.parts}
    assert sources() < repository <= names
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"} <= names
    assert {".clang-format", ".pre-commit-config.yaml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def contents(wheel: Path) -> dict[str, int]:
    """The checksum of every file of a wheel, except for the list of checksums."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    return {file.filename: file.CRC for file in files if not file.filename.endswith("/RECORD")}


def test_tree_builds_the_same_wheel_as_the_source_distribution(
    tree: Path, wheel: Path, tmp_path: Path
) -> None:
    leftover = tree / "build/lib/marginops/csrc/cpu/removed.cpp"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_text("#error This file is of an earlier build.")
    build(tree, tmp_path, "--wheel")
    assert not leftover.exists()
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_metadata_names_requirements_and_extras(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist") or []
    runtime = {text for text in required if "extra ==" not in text}
    assert runtime == {"torch>=2.11", "numpy", "ninja", "pybind11"}
    extras = {"metrics", "norms", "homogeneity", "tables", "report", "transformers", "lightning"}
    extras |= {"demo", "score", "ray", "bench", "test", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    assert metadata["Version"] == marginops.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "BSD-3-Clause"


def test_unknown_kind_of_build_is_an_error(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tree,
        env=os.environ | {"MARGINOPS_BUILD": "ahead"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "MARGINOPS_BUILD: expected jit (the default) or aot, got ahead" in done.stderr


def install(source: Path, folder: Path, **variables: str) -> None:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(folder)]
    run([sys.executable, "-m", "pip", "install", *options, str(source)], source.parent, **variables)


def test_installed_wheel_finds_its_sources(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    install(wheel, folder)
    code = "import marginops; from marginops._native.plan import csrc_folder; print(csrc_folder())"
    path = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(folder)).strip()
    assert Path(path) == folder.resolve() / "marginops/csrc"
    assert recipe.families(Path(path), "cpu") == recipe.families(ROOT / "csrc", "cpu")
    assert (folder / "bin/marginops").is_file()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the packages of the one that runs the tests, except marginops."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    code = "import site; print(site.getsitepackages()[0])"
    site = Path(run([str(folder / "bin/python"), "-c", code], folder).strip())
    for borrowed in map(Path, reversed(sys.path)):
        if borrowed.name not in ("site-packages", "dist-packages") or not borrowed.is_dir():
            continue
        for entry in borrowed.iterdir():
            link = site / entry.name
            if "marginops" not in entry.name and not link.exists():
                link.symlink_to(entry)
    return folder


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(mode: str, tree: Path, environment: Path, tmp_path: Path) -> None:
    python = str(environment / "bin/python")
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    options += ["--config-settings", f"editable_mode={mode}", "--editable", str(tree)]
    run([python, "-m", "pip", "install", *options], tmp_path)

    code = "import marginops; from marginops._native.plan import csrc_folder; print(csrc_folder())"
    assert Path(run([python, "-c", code], tmp_path).strip()) == tree / "csrc"
    file, answer, implementation = run([python, "-c", SELECT], tmp_path).splitlines()
    assert Path(file).resolve() == tree / "marginops/__init__.py"
    assert answer == "[1, 2]"
    assert (implementation != "reference") == marginops._native.load("cpu")

    command = str(environment / "bin/marginops")
    report = json.loads(run([command, "doctor", "--json", "--no-build"], tmp_path))
    assert report["versions"]["marginops"] == marginops.__version__


@pytest.mark.slow
def test_ahead_of_time_build(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    install(tree, folder, MARGINOPS_BUILD="aot")
    names = {path.name.partition(".")[0] for path in folder.glob("marginops/_native/_c*.so")}
    expected = {recipe.module_name("cpu", name) for name in recipe.instruction_sets()}
    assert expected <= names

    def environment(**variables: str) -> dict[str, str]:
        return {"PYTHONPATH": str(folder), "MARGINOPS_DISABLE_JIT": "1"} | variables

    file, answer, implementation = run(
        [sys.executable, "-c", SELECT], tmp_path, **environment()
    ).splitlines()
    assert Path(file).is_relative_to(folder.resolve())
    assert (answer, implementation) == ("[1, 2]", "ahead-of-time")

    for capability in ("default", "avx2", ""):
        variables = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        command = [sys.executable, "-m", "marginops", "doctor", "--json"]
        report = json.loads(run(command, tmp_path, **environment(**variables)))
        best = recipe.instruction_sets(report["platform"]["cpu capability"])[0]
        assert report["kernels"]["cpu"]["build info"]["instruction_set"] == best
        assert set(report["kernels"]["cpu"]["op families"].values()) == {"ahead-of-time"}
        if not capability:
            assert best == recipe.instruction_sets(torch.backends.cpu.get_cpu_capability())[0]

    with (folder / "marginops/csrc/module.cpp").open("a") as source:
        source.write("// changed\n")
    *_, implementation = run([sys.executable, "-c", SELECT], tmp_path, **environment()).splitlines()
    assert implementation == "reference"


@pytest.fixture
def small_tree(tree: Path, tmp_path: Path) -> Path:
    """A copy of the sources whose native code compiles in a second."""
    folder = shutil.copytree(tree, tmp_path / "small", ignore=shutil.ignore_patterns("csrc"))
    write_tiny(folder / "csrc")
    return folder


def test_ahead_of_time_build_with_a_launcher_and_arguments(
    small_tree: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    compiler = write_program(tmp_path / "g++", f'echo "$@" >>{log}\nexec c++ "$@"')
    install(
        small_tree,
        tmp_path / "site",
        MARGINOPS_BUILD="aot",
        CXX=f"env A=1 '{compiler}' -DX='a b'",
    )
    assert list((tmp_path / "site").glob("marginops/_native/_cpu_baseline*.so"))
    compiled = [line for line in log.read_text().splitlines() if "tiny.cpp" in line]
    assert len(compiled) == len(recipe.instruction_sets())
    assert all("-DX=a b" in line for line in compiled)


def test_ahead_of_time_build_without_a_compiler_says_why(small_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="marginops: CXX: expected the command"):
        install(small_tree, tmp_path / "site", MARGINOPS_BUILD="aot", CXX="nonexistent-g++")
