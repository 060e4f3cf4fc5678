"""Finished runs: a file each, whose name tells the settings, the code, the data, the processor."""

import ast
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import marginops
from marginops._native import plan, recipe

from .claim import Claim, Row, Settings
from .data import Sources
from .machine import processor

CLAIMS = Path(__file__).resolve().parents[1]


class Cache:
    """The finished runs of a claim in a folder."""

    def __init__(self, folder: Path, claim: Claim, sources: Sources) -> None:
        self.folder = folder / claim.name
        self.common = {
            "code": code_digest(claim.run),
            "torch": torch.__version__,
            "marginops": package_digest(),
            "processor": processor(),
        }
        self.data_digest = functools.cache(sources.digest)  # files do not change meanwhile

    def path(self, settings: Settings) -> Path:
        """The file of a run, whether it is finished or not."""
        key = self.common | {"settings": settings, "data": self.data_digest(settings["data"])}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def read(self, settings: Settings) -> Row | None:
        """The row of a finished run, or None."""
        try:
            row: Row = json.loads(self.path(settings).read_text())
        except FileNotFoundError:
            return None
        return row


def write(path: Path, row: Row) -> None:
    """Write a row at once: a process that is killed leaves no part of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(row))
    part.replace(path)


def package_digest() -> str:
    """A digest of all modules of marginops and of the sources of its kernels."""
    package = Path(marginops.__file__).parent
    digest = hashlib.sha256(recipe.fingerprint(plan.csrc_folder(), "cpu").encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_digest(function: Callable[..., Any]) -> str:
    """A digest of the module of a function and of what it imports from the claims.

    Comments, docstrings and layout do not count.
    """
    digest = hashlib.sha256()
    known: set[Path] = set()
    waiting = [Path(inspect.getfile(function))]
    while waiting:
        path = waiting.pop()
        if path not in known:
            known.add(path)
            tree = ast.parse(path.read_text())
            waiting += _imports(tree, path)
    for path in sorted(known):
        digest.update(ast.dump(_without_docstrings(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()


def _imports(tree: ast.Module, path: Path) -> list[Path]:
    """The modules of the claims that a module imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(CLAIMS, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else CLAIMS
            module = node.module or ""
            names = [(start, f"{module}.{alias.name}".strip(".")) for alias in node.names]
            names.append((start, module))
        else:
            continue
        found += [start.joinpath(*name.split(".")).with_suffix(".py") for start, name in names]
    return [path for path in found if path.is_file()]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return tree
