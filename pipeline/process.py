"""Every subprocess starts here: shown with ``-v``, in its own group, and gone when we go."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from pipeline.errors import ForgeError

#: Takes one line of text; ``None`` where nothing is to be shown.
Printer = Callable[[str], None]
Argument = str | os.PathLike[str]

_GRACE_SECONDS = 10.0
# An exec step rather than ``preexec_fn``, which is not safe beside the progress bar's thread.
# prctl(1, …) is PR_SET_PDEATHSIG; the parent may have died before the call.
_TIED = """
import ctypes, os, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(143)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class CommandError(ForgeError):
    """A program could not be started, failed or took too long.

    Stages catch it and raise the error of their own family; ``output`` is all that the program
    printed.
    """

    def __init__(self, what: str, *, output: str = "", hint: str = "") -> None:
        super().__init__(what, hint=hint, details=output)
        self.output = output


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived; handled like Ctrl-C so that every ``finally`` runs."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into :class:`Terminated` while the block runs (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_text(command: Sequence[Argument]) -> str:
    return shlex.join(os.fspath(part) for part in command)


def start(
    command: Sequence[Argument],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    show: Printer | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.STDOUT,
    tied: bool = False,
) -> subprocess.Popen[str]:
    """Start ``command`` in a process group of its own, its output on a pipe.

    ``env`` is the whole environment (default: ours). A ``tied`` program gets SIGTERM when this
    process dies, even by SIGKILL, so that no compiler is left behind (Linux).
    """
    if show is not None:
        place = f"(cd {shlex.quote(str(cwd))}) " if cwd is not None else ""
        show(f"$ {place}{command_text(command)}")
    words = [os.fspath(part) for part in command]
    launcher = [sys.executable, "-c", _TIED, str(os.getpid())] if tied else []
    try:
        return subprocess.Popen(
            [*launcher, *words],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CommandError(f"cannot start {words[0]}: {error.strerror or error}") from error


def run(
    command: Sequence[Argument],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    show: Printer | None = None,
    timeout: float | None = None,
    check: bool = True,
    input: str | None = None,
    separate_stderr: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end and return its output.

    stdout and stderr come together in ``stdout`` unless ``separate_stderr``. With ``check`` a
    status other than 0 is a :class:`CommandError` that holds the output. Whatever ends the wait
    early (Ctrl-C, SIGTERM under :func:`terminable`, the timeout) ends the program and all that
    it started.
    """
    process = start(
        command,
        cwd=cwd,
        env=env,
        show=show,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stderr=subprocess.PIPE if separate_stderr else subprocess.STDOUT,
    )
    name = Path(os.fspath(command[0])).name
    try:
        stdout, stderr = process.communicate(input, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        stop(process)
        raise CommandError(
            f"{name} did not end within {timeout:g} s",
            output=_as_text(error.output),
            hint="run it by hand to see what it waits for: " + command_text(command),
        ) from error
    except BaseException:
        stop(process)
        raise
    if check and process.returncode != 0:
        output = stdout + (stderr or "")
        raise CommandError(f"{name} failed ({describe_status(process.returncode)})", output=output)
    return subprocess.CompletedProcess(
        [os.fspath(part) for part in command], process.returncode, stdout, stderr
    )


def stop(process: subprocess.Popen[str], *, grace: float = _GRACE_SECONDS) -> None:
    """End ``process`` and everything below it: SIGTERM, and SIGKILL for what stays."""
    family = _family(process.pid)
    # The group only: Ninja runs each compiler in another one and ends it in good order itself.
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace)
    _, alive = psutil.wait_procs([member for member in family if member.is_running()], timeout=1.0)
    for member in alive:
        with suppress(psutil.Error):
            member.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace)
    if process.stdout is not None:
        process.stdout.close()


def describe_status(status: int) -> str:
    """An exit status as words: ``exit status 2`` or ``killed by SIGKILL``."""
    if status < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"
    return f"exit status {status}"


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def _as_text(output: object) -> str:
    if isinstance(output, bytes):
        return output.decode(errors="replace")
    return output if isinstance(output, str) else ""
