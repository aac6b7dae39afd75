"""Stage test: run the programs of the install tree; on a GPU, measure each tactic."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import Reporter
from pipeline.errors import LibraryTestError
from pipeline.files import read_json
from pipeline.process import CommandError, run

_GPU_TESTS = Path(__file__).resolve().parent.parent / "tests" / "gpu"
_RESULTS = "test.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class LibraryTest:
    """What was run, and what was left out for want of a GPU."""

    device: str
    """Name of the GPU; empty if there is none that the library runs on."""
    outcomes: tuple[Outcome, ...]

    def raise_if_failed(self) -> None:
        failed = [outcome for outcome in self.outcomes if not outcome.ok]
        if failed:
            raise LibraryTestError(
                f"{len(failed)} of {len(self.outcomes)} tests of the library failed: "
                + ", ".join(outcome.name for outcome in failed),
                details="\n".join(outcome.detail for outcome in failed)[-8000:],
                hint="report.md has every row; rerun one with w4a16_test M N K --tactic NAME",
            )


def test_library(install: Path, run_dir: Path, reporter: Reporter) -> LibraryTest:
    """Check the packing against upstream's own, and, where a GPU is, every tactic.

    The sweep's rows (error, limit, time) are left in ``run_dir/test.json`` for the report.
    """
    programs = install / "bin"
    outcomes = [_layout(run_dir / "build", reporter)]
    info = _info(programs / "w4a16_info", reporter)
    device = info.get("device") or {}
    if device.get("status") != "W4A16_OK":
        reporter.say(f"test: {device.get('reason', 'no GPU')}; kernels were not run")
        return LibraryTest(device="", outcomes=tuple(o for o in outcomes if o is not None))
    outcomes.append(_sweep(programs / "w4a16_test", run_dir / _RESULTS, reporter))
    outcomes.append(_gpu_tests(install, reporter))
    return LibraryTest(
        device=str(device.get("name", "")), outcomes=tuple(o for o in outcomes if o is not None)
    )


def _layout(build: Path, reporter: Reporter) -> Outcome | None:
    """Our weight packing against upstream's preprocessor, bit by bit, for each architecture."""
    program = build / "w4a16_layout_check"
    if not program.exists():
        reporter.say("test: the release has no preprocessor to compare the packing with")
        return None
    return _program("packing equals upstream's preprocessor", [program], reporter)


def _info(program: Path, reporter: Reporter) -> dict[str, Any]:
    try:
        text = run([program, "--json"], show=reporter.show, separate_stderr=True).stdout
        info: dict[str, Any] = json.loads(text)
    except (CommandError, ValueError) as error:
        raise LibraryTestError(
            f"{program} does not run", details=str(error), hint="build the library again"
        ) from error
    return info


def _sweep(program: Path, results: Path, reporter: Reporter) -> Outcome:
    results.unlink(missing_ok=True)
    outcome = _program(
        "every tactic: error and time", [program, "--sweep", "--time", "--json", results], reporter
    )
    try:
        rows = read_json(results)["rows"]
    except (OSError, ValueError, KeyError) as error:
        return Outcome(name=outcome.name, ok=False, detail=f"{outcome.detail}\n{error}")
    bad = sum(not row["ok"] for row in rows)
    reporter.say(f"test: {len(rows)} cases on the GPU, {bad} wrong")
    return outcome


def _gpu_tests(install: Path, reporter: Reporter) -> Outcome | None:
    """``tests/gpu`` compares with torch; without torch the sweep alone must do."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "pytest")):
        reporter.say("test: torch or pytest is not installed; tests/gpu was not run")
        return None
    return _program(
        "tests/gpu",
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", _GPU_TESTS],
        reporter,
        cwd=_GPU_TESTS.parent.parent,
        env={**os.environ, "W4A16_LIBRARY": str(install)},
    )


def _program(
    name: str,
    command: list[str | Path],
    reporter: Reporter,
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Outcome:
    try:
        output = run(command, cwd=cwd, env=env, show=reporter.show).stdout
    except CommandError as error:
        return Outcome(name=name, ok=False, detail=str(error))
    reporter.say(f"test: {name}: passed")
    return Outcome(name=name, ok=True, detail=output.strip().splitlines()[-1] if output else "")
