"""The program ``w4a16`` as a process: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from w4a16 import cli
from w4a16.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    InternalError,
    UnsupportedError,
)
from w4a16.library import LIBRARY

RUNTIME = Path(cli.__file__).resolve().parent.parent
COMMANDS = ("info", "doctor", "check", "tune", "convert", "verify", "bench")


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m w4a16``, where no GPU is visible."""
    env = {
        **os.environ,
        "PYTHONPATH": str(RUNTIME),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "W4A16_CACHE": "off",
        **environment,
    }
    command = [sys.executable, "-m", "w4a16", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def missing(tmp_path: Path) -> str:
    return str(tmp_path / "libw4a16.so")


def test_help_lists_every_command() -> None:
    for arguments in (("--help",), ("-h",)):
        done = program(*arguments)
        assert done.returncode == 0
        for name in COMMANDS:
            assert f"\n  {name} " in done.stdout


def test_every_command_has_help_and_touches_no_gpu() -> None:
    for name in COMMANDS:
        done = program(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout


def test_the_version_is_that_of_package_and_library() -> None:
    done = program("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("w4a16 ")
    assert f"(library {LIBRARY.build.version})" in done.stdout


def test_info_works_without_a_gpu() -> None:
    done = program("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert LIBRARY.build.trtllm_commit in done.stdout
    done = program("info", "--json")
    found = json.loads(done.stdout)
    assert found["library"]["tactics"]
    assert found["gpus"] == []


def test_doctor_ends_with_1_where_no_kernel_can_run() -> None:
    done = program("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert "error" in done.stdout
    found = json.loads(program("doctor", "--json").stdout)
    assert found["ok"] is False
    assert any(finding["state"] == "error" for finding in found["findings"])


def test_check_and_bench_end_with_3_without_a_gpu() -> None:
    for arguments in (("check",), ("bench", "1", "1024", "1024")):
        done = program(*arguments)
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith("w4a16: error: ")
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--quick", "--full"),
        ("check", "--seed", "-1"),
        ("check", "--json", "/not/there/report.json"),
        ("bench", "1"),
        ("convert", "/not/there", "/neither"),
        ("tune",),
        ("verify", "/not/there"),
        ("unknown",),
        ("--unknown",),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_2_and_a_reason(arguments: tuple[str, ...]) -> None:
    done = program(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "rror" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_an_error_comes_from_is_shown_only_when_asked_for() -> None:
    done = program("check", "--quick", "--full", W4A16_DEBUG="1")
    assert "Traceback" in done.stderr
    assert "ArgumentError" in done.stderr


def test_without_its_library_the_program_still_says_what_to_do(missing: str) -> None:
    done = program("doctor", W4A16_LIBRARY=missing)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"W4A16_LIBRARY={missing} is not a file" in done.stdout
    assert "unset W4A16_LIBRARY" in done.stdout
    done = program("info", W4A16_LIBRARY=missing)
    assert done.returncode == 0
    assert "is not a file" in done.stdout
    assert "is not a file" in program("--version", W4A16_LIBRARY=missing).stdout


@pytest.mark.parametrize("arguments", [("check", "--quick"), ("tune", "--x", "y"), ("bench", "1")])
def test_other_commands_without_the_library_end_with_3(
    missing: str, arguments: tuple[str, ...]
) -> None:
    done = program(*arguments, W4A16_LIBRARY=missing)
    assert done.returncode == 3
    assert done.stderr.startswith(f"w4a16: error: W4A16_LIBRARY={missing} is not a file")
    assert "w4a16 doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_library_is_no_traceback(tmp_path: Path) -> None:
    damaged = tmp_path / "libw4a16.so"
    damaged.write_bytes(b"not a library")
    done = program("doctor", W4A16_LIBRARY=str(damaged))
    assert done.returncode == 1
    assert "cannot be loaded" in done.stdout


def test_the_installed_script_also_survives_a_missing_library(tmp_path: Path, missing: str) -> None:
    script = tmp_path / "w4a16"
    script.write_text("import sys\nfrom w4a16.cli import main\nsys.exit(main())\n")
    env = {**os.environ, "PYTHONPATH": str(RUNTIME), "W4A16_LIBRARY": missing}
    command = [sys.executable, str(script), "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a file" in done.stdout


def test_any_other_process_gets_an_import_error_without_the_library(missing: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(RUNTIME), "W4A16_LIBRARY": missing}
    command = [sys.executable, "-c", "import w4a16"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: W4A16_LIBRARY=")


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    env = {**os.environ, "PYTHONPATH": str(RUNTIME), "CUDA_VISIBLE_DEVICES": ""}
    command = f"{sys.executable} -m w4a16 info --json | head -c 1"
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr


def test_exit_codes_tell_bad_input_from_a_machine_that_cannot() -> None:
    codes = {
        ArgumentError: 2,
        FormatError: 2,
        UnsupportedError: 2,
        DeviceError: 3,
        InternalError: 1,
        ImportError: 3,
        FileNotFoundError: 2,
    }
    for kind, code in codes.items():
        assert cli.exit_code(kind("x")) == code


def test_the_packages_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from w4a16.errors import W4A16Warning

    cli._show_warning(W4A16Warning("odd"), W4A16Warning, "file.py", 3)
    cli._show_warning(DeprecationWarning("old"), DeprecationWarning, "file.py", 3)
    assert capsys.readouterr().err == "w4a16: warning: odd\n"
