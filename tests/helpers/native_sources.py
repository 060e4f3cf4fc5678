"""A small native library, which compiles in about a second, and checks of its loader."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from marginops._native import NativeUnavailableWarning
from marginops._native.loader import Loader

MODULE = """
#include <Python.h>

#include "common/number.h"

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:i,s:[s]}", "number", NUMBER, "families", "tiny");
}

static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {}};
static PyModuleDef_Slot slots[] = {{0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", "", 0, methods, slots};

#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModuleDef_Init(&definition); }
"""


def write_tiny(folder: Path, *, kernel: str = "int tiny() { return 0; }") -> Path:
    """Writes a csrc folder with one CPU family."""
    for name, text in {
        "module.cpp": MODULE,
        "common/number.h": "#define NUMBER 1",
        "cpu/tiny.cpp": kernel,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def write_program(path: Path, body: str) -> str:
    """Writes a shell script that stands for a compiler, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def only_library(folder: Path) -> Path:
    """The library in a folder that holds one cache."""
    (found,) = folder.glob("cache/*/*/*.so")
    return found


def new_loader(csrc: Path) -> Loader:
    """A loader as a new process has it, without libraries built ahead of time."""
    return Loader(csrc, installed=csrc)


def expect_reference(loader: Loader, reason: str) -> None:
    """Check that only the first call warns, once, and gives the reason."""
    with pytest.warns(NativeUnavailableWarning, match=reason) as caught:
        assert not loader.load("cpu")
    assert len(caught) == 1
    assert "marginops doctor" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not loader.load("cpu")
    assert loader.outcome("cpu").implementation == "reference"
