"""The example runs, and finds that nothing was lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(program: Path, *options: str) -> str:
    path = os.pathsep.join([str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *options, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_nothing_was_lost(output: str) -> None:
    errors = [float(error) for error in re.findall(r"error of the logits (\S+),", output)]
    assert len(errors) == 2
    assert max(errors) < 5e-3, output
    assert len(output.splitlines()) < 10


def test_the_example_converts_loads_and_compares() -> None:
    assert_nothing_was_lost(run(ROOT / "examples" / "hf_gptq.py"))


def test_the_example_runs_without_transformers(tmp_path: Path) -> None:
    program = tmp_path / "without.py"
    program.write_text(
        "import importlib.util, runpy\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: (\n"
        "    None if name == 'transformers' else find(name, *more))\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'hf_gptq.py')!r}, run_name='__main__')\n"
    )
    assert_nothing_was_lost(run(program))
