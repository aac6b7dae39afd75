"""Subprocesses: their output, their failures, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.process import CommandError, Terminated, describe_status, run, start, terminable

ROOT = Path(__file__).parents[2]


def gone(pid: int) -> bool:
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.1)
    return False


def test_output_of_both_streams_is_returned_together() -> None:
    assert run(["sh", "-c", "echo one; echo two >&2"]).stdout == "one\ntwo\n"


def test_streams_are_kept_apart_on_request() -> None:
    result = run(["sh", "-c", "echo one; echo two >&2"], separate_stderr=True)
    assert (result.stdout, result.stderr) == ("one\n", "two\n")


def test_a_failure_carries_the_status_and_all_output() -> None:
    with pytest.raises(CommandError, match=r"sh failed \(exit status 3\)") as caught:
        run(["sh", "-c", "echo broken; exit 3"])
    assert caught.value.output == "broken\n"


def test_a_failure_can_be_left_to_the_caller() -> None:
    assert run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandError, match="cannot start no-such-program"):
        run(["no-such-program"])


def test_the_command_is_shown_as_it_can_be_typed(tmp_path: Path) -> None:
    shown: list[str] = []
    run(["true", "a b"], cwd=tmp_path, show=shown.append)
    assert shown == [f"$ (cd {tmp_path}) true 'a b'"]


def test_input_reaches_the_program() -> None:
    assert run(["cat"], input="words").stdout == "words"


def test_output_that_is_no_text_is_no_fault() -> None:
    assert "a" in run(["printf", "a\\377b"]).stdout


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(CommandError, match=r"within 0\.5 s"):
        run(["sh", "-c", f"sleep 30 & echo $! > {pid_file}; wait"], timeout=0.5)
    assert gone(int(pid_file.read_text()))


def test_a_program_killed_by_a_signal_is_said_so() -> None:
    with pytest.raises(CommandError, match="killed by SIGKILL"):
        run(["sh", "-c", "kill -9 $$"])
    assert describe_status(-99) == "killed by signal 99"


def test_a_termination_ends_the_running_program(tmp_path: Path) -> None:
    code = (
        "from pipeline.process import *\n"
        "with terminable():\n"
        f"    run(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 30'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid_file = tmp_path / "pid"
    for _ in range(100):
        if pid_file.exists() and pid_file.read_text().strip():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=20) != 0
    assert gone(int(pid_file.read_text()))


def test_a_tied_program_ends_when_this_process_is_killed_outright(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pipeline.process import *\n"
        f"p = start(['sleep', '30'], tied=True)\nopen('{tmp_path}/pid', 'w').write(str(p.pid))\n"
        "time.sleep(30)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid_file = tmp_path / "pid"
    for _ in range(100):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert gone(int(pid_file.read_text()))


def test_a_tied_program_gives_its_own_status() -> None:
    process = start(["sh", "-c", "exit 7"], tied=True)
    assert process.wait() == 7


def test_sigterm_is_an_exception_only_while_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminated() -> None:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(Terminated):
        terminated()
    assert signal.getsignal(signal.SIGTERM) is before
