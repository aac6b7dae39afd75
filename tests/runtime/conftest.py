"""Tests of the Python package, without a GPU, against whatever library the pipeline built last."""

from __future__ import annotations

import os

import pytest

from tests.gpu.library import ROOT, LibraryNotFoundError, find_library

# For processes that tests start; for this one, pyproject.toml names it.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT / "runtime"), os.environ.get("PYTHONPATH")])
)

# Before anything imports the package: it loads the library.
try:
    os.environ["W4A16_LIBRARY"] = str(find_library())
except LibraryNotFoundError as error:
    pytest.exit(f"tests/runtime: {error}, or `nox -s demo`", returncode=4)
