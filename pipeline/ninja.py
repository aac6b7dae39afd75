"""Run Ninja and watch it: which units run, their memory, what failed, in full."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.process import Printer, run, start, stop

_MARK = "@@w4a16 "
_STATUS = re.compile(rf"^{re.escape(_MARK)}(\d+)/(\d+) (.*)$")
_FAILED = re.compile(r"^FAILED:\s+(?:\[code=(-?\d+)\]\s+)?(.*?)\s*$")
_OBJECT = re.compile(r"\bobject (\S+)$")
_OUTPUT_OPTION = re.compile(r"\s-o\s+(\S+\.o)\b")
_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One command of the build that failed."""

    outputs: str
    status: int
    command: str
    message: str


@dataclass(kw_only=True)
class Running:
    """A compilation in progress."""

    output: str
    since: float
    memory: int = 0
    peak: int = 0


@dataclass(kw_only=True)
class Watch:
    """What is known of a build while it runs; ``finished`` holds each compiled object's peak."""

    total: int = 0
    done: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    peak: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: int
    failures: tuple[Failure, ...]
    peaks: Mapping[str, int]
    """Object → peak memory of its compiler processes, of those compiled now."""
    peak: int
    """Of all of them together."""
    text: str
    """Everything Ninja printed."""


def pending_objects(
    ninja: Path, folder: Path, env: Mapping[str, str], show: Printer | None = None
) -> tuple[str, ...]:
    """The objects that a run would compile now."""
    result = run([ninja, "-C", folder, "-n"], env=_env(env), show=show, check=False)
    found = []
    for line in result.stdout.splitlines():
        status = _STATUS.match(line)
        built = _OBJECT.search(status[3]) if status else None
        if built:
            found.append(built[1])
    return tuple(found)


def run_ninja(
    ninja: Path,
    folder: Path,
    *,
    jobs: int,
    env: Mapping[str, str],
    on_change: Callable[[Watch], None],
    show: Printer | None = None,
    targets: Sequence[str] = (),
) -> Outcome:
    """Build everything that can be built (``-k 0``); ``on_change`` is called as things move.

    When the call is left by an exception (Ctrl-C, SIGTERM), Ninja and its compilers are ended;
    Ninja removes half-written objects itself, and its log stays valid.
    """
    command = [str(ninja), "-C", str(folder), "-j", str(jobs), "-k", "0", *targets]
    process = start(command, env=_env(env), show=show, tied=True)
    assert process.stdout is not None
    stream = process.stdout.fileno()
    watch = Watch()
    parser = _Parser(watch)
    sampled = 0.0
    try:
        buffer = b""
        while True:
            ready, _, _ = select.select([stream], [], [], _SAMPLE_SECONDS)
            if ready:
                data = os.read(stream, 1 << 16)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    parser.feed(line.decode("utf-8", "replace"))
            now = time.monotonic()
            if now - sampled >= _SAMPLE_SECONDS:
                _sample(process.pid, watch, now)
                sampled = now
            on_change(watch)
        if buffer:
            parser.feed(buffer.decode("utf-8", "replace"))
        status = process.wait()
    except BaseException:
        stop(process)
        raise
    parser.close()
    on_change(watch)
    return Outcome(
        status=status,
        failures=tuple(parser.failures),
        peaks=dict(watch.finished),
        peak=watch.peak,
        text="\n".join(parser.lines),
    )


def read_log(folder: Path) -> dict[str, float]:
    """Output → seconds of its last command, from ``.ninja_log`` (versions 5 to 7)."""
    found: dict[str, float] = {}
    try:
        text = (folder / ".ninja_log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) >= 5 and fields[0].isdigit() and fields[1].isdigit():
            found[fields[3]] = (int(fields[1]) - int(fields[0])) / 1000
    return found


_KILLED = re.compile(
    r"\bKilled\b|signal 9\b|SIGKILL|out of memory|virtual memory exhausted|Cannot allocate memory"
    r"|std::bad_alloc",
    re.IGNORECASE,
)


def ran_out_of_memory(failures: Iterable[Failure]) -> bool:
    """Whether a compiler was killed, which the kernel does when memory runs out."""
    return any(
        failure.status in (-9, 137) or _KILLED.search(failure.message) for failure in failures
    )


class _Parser:
    """Ninja's output, a line at a time."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.lines: list[str] = []
        self.failures: list[Failure] = []
        self._head: tuple[str, int] | None = None
        self._body: list[str] = []

    def feed(self, line: str) -> None:
        status = _STATUS.match(line)
        failed = _FAILED.match(line)
        if status or failed or line.startswith("ninja: "):
            self.close()
        if status:
            self.watch.done, self.watch.total = int(status[1]), int(status[2])
            line = status[3]
            built = _OBJECT.search(line)
            if built:
                ended = self.watch.running.pop(built[1], None)
                self.watch.finished[built[1]] = ended.peak if ended else 0
        elif failed:
            self._head = failed[2], int(failed[1] or 1)
        elif self._head is not None:
            self._body.append(line)
        self.lines.append(line)

    def close(self) -> None:
        if self._head is not None:
            outputs, status = self._head
            command, *message = self._body or [""]
            text = "\n".join(message).strip("\n")
            self.failures.append(
                Failure(outputs=outputs, status=status, command=command, message=text)
            )
            for output in outputs.split():
                self.watch.finished.pop(output, None)
        self._head, self._body = None, []


def _sample(pid: int, watch: Watch, now: float) -> None:
    """Measure the compilers below Ninja; each of its children is one command."""
    running: dict[str, Running] = {}
    total = 0
    children: list[psutil.Process] = []
    with suppress(psutil.Error):
        children = psutil.Process(pid).children()
    for child in children:
        memory = 0
        command: list[str] = []
        with suppress(psutil.Error):
            command = child.cmdline()
            for member in (child, *child.children(recursive=True)):
                with suppress(psutil.Error):
                    memory += member.memory_info().rss
        total += memory
        built = _OUTPUT_OPTION.search(" " + " ".join(command))
        if built is None:
            continue
        before = watch.running.get(built[1])
        entry = before or Running(output=built[1], since=now)
        entry.memory = memory
        entry.peak = max(entry.peak, memory)
        running[built[1]] = entry
    watch.running = running
    watch.memory = total
    watch.peak = max(watch.peak, total)


def _env(env: Mapping[str, str]) -> dict[str, str]:
    return {**env, "NINJA_STATUS": f"{_MARK}%f/%t ", "CLICOLOR_FORCE": "0"}
