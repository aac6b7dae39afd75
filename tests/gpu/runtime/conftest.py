"""Tests of the Python package on a GPU, against the library that the other GPU tests take."""

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
except LibraryNotFoundError:
    collect_ignore_glob = ["test_*.py"]  # tests/gpu says why there is no library


@pytest.fixture(autouse=True)
def _on_a_gpu(gpu: None) -> None:
    """Skips, with the reason, where the kernels cannot run."""
