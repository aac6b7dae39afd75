"""``w4a16 check`` on a GPU: everything is right, by torch's arithmetic and by numpy's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from w4a16 import check
from w4a16.check_formats import FORMATS
from w4a16.library import LIBRARY

from .. import reference


@pytest.mark.parametrize("arithmetic", ["torch", "numpy"])
def test_every_tactic_and_format_is_right(arithmetic: str) -> None:
    report = check.run(0, seed=reference.SEED, arithmetic=arithmetic)
    assert not report.aborted, report.aborted
    wrong = [f"{row}: {row.problem}" for row in report.failures]
    assert not wrong, "\n".join(wrong[:50])
    assert report.ok
    assert {row.name for row in report.rows if row.part == "tactic"} == set(LIBRARY.tactic_index)
    assert {row.name for row in report.rows if row.part == "format"} == {f.name for f in FORMATS}
    gemms = {tactic.name for tactic in LIBRARY.tactics if tactic.kind == "gemm"}
    exact = {row.name for row in report.rows if row.part == "tactic" and row.test == "identity"}
    assert exact == gemms
    for name in gemms:
        rows = {row.m for row in report.rows if row.name == name and row.test == "product"}
        assert rows == set(check.ROWS)
    check.show(report)
    print(f"{report.seconds:.1f} s")


def test_the_command_ends_with_0_and_writes_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    root = Path(check.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [
        sys.executable,
        "-m",
        "w4a16",
        "check",
        "--quick",
        "--seed",
        "7",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
    assert json.loads(file.read_text())["ok"] is True


def test_doctor_and_info_find_nothing_wrong_on_this_gpu() -> None:
    root = Path(check.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    for arguments in (("doctor", "--json"), ("info", "--json")):
        command = [sys.executable, "-m", "w4a16", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        if arguments[0] == "doctor":
            checks = {finding["check"]: finding["state"] for finding in found["findings"]}
            assert checks["product"] == "ok", found
        else:
            assert found["gpus"][0]["problem"] == ""
