"""Sessions: thin calls of ``python -m pipeline``. Arguments after ``--`` go to each of them.

nox -s extract build test -- --trtllm SRC[@REF] --cutlass SRC[@REF] --config FILE --out DIR -j N -v
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["demo"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "uv|virtualenv"

DEMO = "artifacts/demo"


def _pipeline(session: nox.Session, stage: str, *arguments: str) -> None:
    session.run("python", "-m", "pipeline", stage, *arguments, *session.posargs)


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
    session.install("-e", ".[test]")
    session.run("pytest", "tests/unit", "tests/integration")
    _pipeline(session, "test")


@nox.session
def regenerate(session: nox.Session) -> None:
    """Move to another release (-- --to REF), make everything anew, and print what changed."""
    session.install("-e", ".")
    _pipeline(session, "regenerate")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the whole pipeline on the miniature upstream: offline, a real build, two minutes."""
    session.install("-e", ".")
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
    place = ("--out", f"{DEMO}/run", "--vendor", f"{DEMO}/vendor")
    for stage in ("extract", "build", "test"):
        _pipeline(session, stage, "--config", "configs/demo.yaml", *sources, *place)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[lint,test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
