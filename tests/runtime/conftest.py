"""Tests of the Python package, without a GPU, against whatever library the pipeline built last."""

from __future__ import annotations

import pytest

from tests.gpu.library import LibraryNotFoundError, point_package_at_library

try:
    point_package_at_library()
except LibraryNotFoundError as error:
    pytest.exit(f"tests/runtime: {error}, or `nox -s demo`", returncode=4)
