"""Sessions: thin calls of ``python -m pipeline``. Arguments after ``--`` go to each of them.

nox -s extract build test -- --trtllm SRC[@REF] --cutlass SRC[@REF] --config FILE --out DIR -j N -v
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["demo"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "uv|virtualenv"

DEMO = "artifacts/demo"


def _pipeline(session: nox.Session, stage: str, *arguments: str) -> None:
    session.run("python", "-m", "pipeline", stage, *arguments, *session.posargs)


def _miniature(session: nox.Session, *stages: str, posargs: Sequence[str] = ()) -> None:
    shutil.rmtree(f"{DEMO}/upstream", ignore_errors=True)
    session.run("python", "-m", "tests.upstream", f"{DEMO}/upstream", silent=True)
    # The miniature is made anew, and may have changed: what was locked before does not bind it.
    Path(DEMO, "run", "upstream.lock.yaml").unlink(missing_ok=True)
    sources = (
        "--trtllm",
        f"{DEMO}/upstream/trtllm@v1.0.0",
        "--cutlass",
        f"{DEMO}/upstream/cutlass",
    )
    place = ("--config", "configs/demo.yaml", "--out", f"{DEMO}/run", "--vendor", f"{DEMO}/vendor")
    for stage in stages:
        session.run("python", "-m", "pipeline", stage, *place, *sources, *posargs)


@nox.session
def extract(session: nox.Session) -> None:
    """Fetch a release, generate, select and vendor its kernels, and render the bundle."""
    session.install("-e", ".")
    _pipeline(session, "extract")


@nox.session
def build(session: nox.Session) -> None:
    """Compile the bundle, install the library and verify it."""
    session.install("-e", ".")
    _pipeline(session, "build")


@nox.session
def test(session: nox.Session) -> None:
    """Run this project's tests, then test the library in DIR (on a GPU: error and time too)."""
    session.install("-e", ".[test,wheel,bench]")
    session.run("pytest", "tests/unit", "tests/integration")
    _pipeline(session, "test")


@nox.session
def wheel(session: nox.Session) -> None:
    """Make the wheel, the bundle's tarball and SHA256SUMS from the library that build left."""
    session.install("-e", ".[wheel]")
    _pipeline(session, "wheel")


@nox.session
def test_package(session: nox.Session) -> None:
    """Run the Python package's tests without a GPU; they bring torch, whose CPU build will do."""
    session.install("-e", ".[test,package]")
    if not any(Path("artifacts").glob("*/*/dist/install/lib*/libw4a16.so")):
        _miniature(session, "extract", "build")  # they need some library
    session.run("pytest", "tests/runtime")


@nox.session
def bench(session: nox.Session) -> None:
    """Time every tactic, the floor and the peers on this GPU (-- --short; -- --help)."""
    alone = {"--no-peers", "--suite=fusion", "fusion"} & set(session.posargs)
    extras = "bench,package" if alone else "bench,package,peers"
    session.install("-e", f".[{extras}]")
    session.run("python", "-m", "benchmarks.suite", *session.posargs)


@nox.session
def regenerate(session: nox.Session) -> None:
    """Move to another release (-- --to REF), make everything anew, and print what changed."""
    session.install("-e", ".")
    _pipeline(session, "regenerate")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the whole pipeline on the miniature upstream: offline, a real build, two minutes."""
    session.install("-e", ".")
    _miniature(session, "extract", "build", "test", posargs=session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[lint,test,wheel]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
