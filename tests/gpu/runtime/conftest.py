"""Tests of the Python package on a GPU, against the library that the other GPU tests take."""

from __future__ import annotations

import pytest

from tests.gpu.library import LibraryNotFoundError, point_package_at_library

try:
    point_package_at_library()
except LibraryNotFoundError:
    collect_ignore_glob = ["test_*.py"]  # tests/gpu says why there is no library


@pytest.fixture(autouse=True)
def _on_a_gpu(gpu: None) -> None:
    """Skips, with the reason, where the kernels cannot run."""
