"""Build the bundle with CMake and Ninja, within the plan's memory, and install what it makes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.errors import BuildError, ResourceError
from pipeline.files import (
    digest_json,
    read_json,
    recover_folder,
    remove_tree,
    replaced_folder,
    tree_digests,
    walk_files,
    write_json,
    write_text,
)
from pipeline.model import Build, UnitFigures, to_json
from pipeline.ninja import (
    Failure,
    Watch,
    pending_objects,
    ran_out_of_memory,
    read_log,
    run_ninja,
)
from pipeline.plan import Plan, gigabytes, render_unity_plan, schedule_length
from pipeline.process import CommandError, Printer, run
from pipeline.toolchain import Toolchain

DISK_BYTES = 1_500_000_000
PLAN_FILE = "unity-plan.cmake"
#: The plan that ``work_dir`` was built with, for the next run to stay close to.
PLAN_JSON = "plan.json"
# What a caller's shell must not slip into the library.
_CLEARED = (
    "CFLAGS",
    "CXXFLAGS",
    "CUDAFLAGS",
    "LDFLAGS",
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
    "DESTDIR",
    "CMAKE_GENERATOR",
    "CMAKE_BUILD_TYPE",
    "CMAKE_TOOLCHAIN_FILE",
    "MAKEFLAGS",
)


def build(
    bundle_dir: Path,
    work_dir: Path,
    install_dir: Path,
    toolchain: Toolchain,
    plan: Plan,
    *,
    console: Console,
    definitions: Mapping[str, str] | None = None,
    jobs: int | None = None,
    verbose: bool = False,
    disk_bytes: int = DISK_BYTES,
) -> Build:
    """Compile what changed in ``bundle_dir``, link, and put the install tree in place.

    ``work_dir`` keeps the objects from run to run. ``definitions`` are CMake variables. A failure
    is a :class:`BuildError` with the compilers' messages in full, after everything else was
    compiled, so that the next run has only the failed and changed units to do.
    """
    show: Printer | None = _printer(console) if verbose else None
    started = time.monotonic()
    _check_disk(work_dir, disk_bytes)
    work_dir.mkdir(parents=True, exist_ok=True)
    digests = tree_digests(bundle_dir)
    configure = _configure_command(bundle_dir, work_dir, toolchain, definitions or {})
    _start_anew_if_needed(bundle_dir, work_dir, toolchain)
    write_json(work_dir / PLAN_JSON, to_json(plan))
    env = _environment(work_dir, toolchain)
    _settle_times(bundle_dir, work_dir, digests)
    _configure(bundle_dir, work_dir, configure, plan, digests, env, show)
    running_jobs = plan.jobs if jobs is None else max(1, min(jobs, plan.jobs))
    peak = _compile(work_dir, toolchain, plan, running_jobs, env, console, show)
    _install(work_dir, install_dir, toolchain, env, show)
    return Build(
        install=os.path.relpath(install_dir, work_dir.parent),
        compiler=f"nvcc {toolchain.version_text} ({toolchain.origin}), {toolchain.host_version}",
        flags=_cuda_flags(work_dir),
        cmake=".".join(str(part) for part in toolchain.cmake_version),
        jobs=running_jobs,
        seconds=round(time.monotonic() - started, 1),
        peak_bytes=peak,
        units=_figures(work_dir, plan),
    )


def _printer(console: Console) -> Printer:
    def show(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def _read(path: Path) -> object:
    """A record of an earlier run; None if there is none or it is damaged."""
    try:
        return cast(object, read_json(path))
    except (OSError, ValueError):
        return None


# --- before -------------------------------------------------------------------------------------


def _check_disk(work_dir: Path, needed: int) -> None:
    place = work_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{gigabytes(free)} free in {place}, and a build needs {gigabytes(needed)}",
            hint="free disk space or give a folder on another disk with --out",
        )


def _configure_command(
    bundle_dir: Path, work_dir: Path, toolchain: Toolchain, definitions: Mapping[str, str]
) -> list[str]:
    chosen = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": str(toolchain.ninja),
        "CMAKE_CXX_COMPILER": str(toolchain.host_compiler),
        "CMAKE_CUDA_COMPILER": str(toolchain.nvcc),
        "CMAKE_CUDA_HOST_COMPILER": str(toolchain.host_compiler),
        "CUDAToolkit_ROOT": str(toolchain.root),
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "W4A16_UNITY_PLAN": str(work_dir / PLAN_FILE),
        **definitions,
    }
    command = [str(toolchain.cmake), "-S", str(bundle_dir), "-B", str(work_dir), "-G", "Ninja"]
    return command + [f"-D{name}={value}" for name, value in sorted(chosen.items())]


def _start_anew_if_needed(bundle_dir: Path, work_dir: Path, toolchain: Toolchain) -> None:
    """Objects of another compiler or place are of no use, and CMake cannot switch in a tree.

    Everything else (definitions, the plan, CMake itself) only makes CMake run again.
    """
    identity = {
        "bundle": str(bundle_dir),
        "work": str(work_dir),
        "toolchain": toolchain.identity,
    }
    if _read(work_dir / "toolchain.json") != identity:
        for entry in work_dir.iterdir():
            remove_tree(entry)
        write_json(work_dir / "toolchain.json", identity)


def _environment(work_dir: Path, toolchain: Toolchain) -> dict[str, str]:
    env = {name: value for name, value in toolchain.env().items() if name not in _CLEARED}
    # nvcc's temporary files reach hundreds of MB: not into a small or in-memory /tmp, and what a
    # killed run left goes with the next.
    temporary = work_dir / "tmp"
    remove_tree(temporary)
    temporary.mkdir(parents=True)
    return {**env, "TMPDIR": str(temporary)}


def _settle_times(bundle_dir: Path, work_dir: Path, digests: Mapping[str, str]) -> None:
    """Make times of change tell what changed: Ninja knows nothing else.

    A file with the content that it had at the last build gets the time it had then, however it
    was written again; one whose content differs gets a new time, even if it came with an old one.
    """
    record = work_dir / "sources.json"
    known: Any = _read(record)
    if not isinstance(known, dict):
        # Nothing is known of what the objects were made from: all of them are old.
        known = {name: ["", sys.maxsize] for name in digests}
    current: dict[str, list[object]] = {}
    for name, digest in digests.items():
        path = bundle_dir / name
        changed = path.stat().st_mtime_ns
        before = known.get(name)
        if before is not None and before[0] == digest and before[1] != changed:
            os.utime(path, ns=(before[1], before[1]))
            changed = before[1]
        elif before is not None and before[0] != digest and before[1] >= changed:
            os.utime(path)
            changed = path.stat().st_mtime_ns
        current[name] = [digest, changed]
    write_json(record, current)


def _configure(
    bundle_dir: Path,
    work_dir: Path,
    command: Sequence[str],
    plan: Plan,
    digests: Mapping[str, str],
    env: Mapping[str, str],
    show: Printer | None,
) -> None:
    """Run CMake unless nothing that it reads has changed."""
    unity = render_unity_plan(plan)
    write_text(work_dir / PLAN_FILE, unity)
    inputs = {
        name: digest
        for name, digest in digests.items()
        if name.endswith(("CMakeLists.txt", ".cmake", ".in", "CMakePresets.json"))
    }
    wanted = digest_json(
        {"command": list(command), "inputs": inputs, "names": sorted(digests), "plan": unity}
    )
    stamp = work_dir / "configured.json"
    if (work_dir / "build.ninja").is_file() and _read(stamp) == wanted:
        return
    stamp.unlink(missing_ok=True)
    try:
        run(command, cwd=bundle_dir, env=env, show=show)
    except CommandError as error:
        raise BuildError(
            "CMake could not configure the bundle",
            details=error.output,
            hint="run again with -v to see the command",
        ) from error
    write_json(stamp, wanted)


# --- compile -------------------------------------------------------------------------------------


def _compile(
    work_dir: Path,
    toolchain: Toolchain,
    plan: Plan,
    jobs: int,
    env: Mapping[str, str],
    console: Console,
    show: Printer | None,
) -> int:
    pending = pending_objects(toolchain.ninja, work_dir, env, show)
    if show is not None:
        for command in _commands(work_dir, pending):
            show(f"$ {command}")
    board = _Board(plan, pending, jobs, console)
    live = console.is_terminal and bool(pending)
    with Live(board, console=console, transient=True) if live else nullcontext():
        outcome = run_ninja(
            toolchain.ninja, work_dir, jobs=jobs, env=env, on_change=board.update, show=show
        )
    write_text(work_dir / "ninja.log", outcome.text + "\n")
    _remember_peaks(work_dir, outcome.peaks)
    peak = _overall_peak(work_dir, outcome.peak)
    if outcome.status != 0:
        raise _failed(outcome.failures, outcome.text, plan, work_dir)
    return peak


def _commands(work_dir: Path, outputs: Sequence[str]) -> list[str]:
    """The compilers' command lines for ``outputs``."""
    entries = _read(work_dir / "compile_commands.json")
    if not isinstance(entries, list):
        return []
    wanted = {str(work_dir / output) for output in outputs}
    return [
        str(entry["command"])
        for entry in entries
        if str(work_dir / entry.get("output", "")) in wanted
    ]


def _failed(failures: Sequence[Failure], text: str, plan: Plan, work_dir: Path) -> BuildError:
    if not failures:
        return BuildError("Ninja failed", details=text, hint="run again with -v")
    names = [unit_name(failure.outputs.split()[0], plan) for failure in failures]
    details = "\n\n".join(
        f"--- {name}\n{failure.message or failure.command}"
        for name, failure in zip(names, failures, strict=True)
    )
    if ran_out_of_memory(failures):
        hint = (
            "a compiler was killed, most likely for want of memory: run again with a smaller "
            "--jobs or --memory; what was compiled is kept"
        )
    else:
        hint = (
            "correct the cause and run again: only failed and changed units are compiled; the "
            f"commands are in {work_dir / 'ninja.log'}"
        )
    count = "1 unit" if len(failures) == 1 else f"{len(failures)} units"
    return BuildError(f"{count} failed to build: {', '.join(names)}", details=details, hint=hint)


def unit_name(output: str, plan: Plan) -> str:
    """The plan's unit that an object belongs to, or the object's own name."""
    stem = output.removesuffix(".o")
    for unit in plan.units:
        if len(unit.members) > 1:
            if f"/Unity/unity_{unit.name}_" in output:
                return unit.name
        elif stem.endswith("/" + unit.members[0]):
            return unit.name
    return Path(stem).name


class _Board:
    """The live display, and the plain lines that stand in for it where there is no terminal."""

    def __init__(self, plan: Plan, pending: Sequence[str], jobs: int, console: Console) -> None:
        self._plan = plan
        self._jobs = jobs
        self._console = console
        self._predicted = {unit.name: unit.seconds for unit in plan.units}
        self._pending = list(pending)
        self._started = time.monotonic()
        self._begun: dict[str, float] = {}
        self._told: set[str] = set()
        self._watch = Watch()

    def update(self, watch: Watch) -> None:
        self._watch = watch
        for output, running in watch.running.items():
            self._begun.setdefault(output, running.since)
        for output, peak in list(watch.finished.items()):
            if output not in self._told:
                self._told.add(output)
                self._tell(output, peak)

    def _tell(self, output: str, peak: int) -> None:
        if self._console.is_terminal:
            return
        name = unit_name(output, self._plan)
        begun = self._begun.get(output)
        seconds = f" in {time.monotonic() - begun:.0f} s" if begun is not None else ""
        memory = f", {gigabytes(peak)}" if peak else ""
        self._console.print(
            f"[{len(self._told)}/{len(self._pending)}] {name}{seconds}{memory}; "
            f"about {self._remaining():.0f} s left",
            markup=False,
            highlight=False,
        )

    def _left(self, output: str, now: float) -> float:
        predicted = self._predicted.get(unit_name(output, self._plan), 2.0)
        begun = self._begun.get(output)
        return predicted if begun is None else max(0.0, predicted - (now - begun))

    def _remaining(self) -> float:
        now = time.monotonic()
        open_ = [output for output in self._pending if output not in self._watch.finished]
        running = [output for output in open_ if output in self._watch.running]
        waiting = [output for output in open_ if output not in self._watch.running]
        return schedule_length(
            (self._left(output, now) for output in running + waiting), self._jobs
        )

    def __rich__(self) -> Group:
        now = time.monotonic()
        remaining = self._remaining()
        elapsed = now - self._started
        table = Table.grid(padding=(0, 2))
        for output, running in sorted(self._watch.running.items()):
            left = self._left(output, now)
            table.add_row(
                Text("  " + unit_name(output, self._plan)),
                Text(f"{now - running.since:.0f} s"),
                Text(f"about {left:.0f} s left" if left else "longer than foreseen"),
                Text(gigabytes(running.memory)),
            )
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{len(self._watch.finished)} of {len(self._pending)} compiled"),
            ProgressBar(total=max(elapsed + remaining, 1e-3), completed=elapsed, width=30),
            Text(f"{elapsed:.0f} s, about {remaining:.0f} s left"),
            Text(f"{gigabytes(self._watch.memory)} (most {gigabytes(self._watch.peak)})"),
        )
        return Group(head, table)


# --- after ---------------------------------------------------------------------------------------


def _remember_peaks(work_dir: Path, peaks: Mapping[str, int]) -> None:
    known = _peaks(work_dir)
    write_json(work_dir / "peaks.json", {**known, **peaks})


def _peaks(work_dir: Path) -> dict[str, int]:
    known = _read(work_dir / "peaks.json")
    if not isinstance(known, dict):
        return {}
    return {str(name): int(value) for name, value in known.items()}


def _overall_peak(work_dir: Path, measured: int) -> int:
    """The most memory that compilers took together since this folder was begun."""
    record = work_dir / "peak.json"
    known = _read(record)
    peak = max(known, measured) if isinstance(known, int) else measured
    write_json(record, peak)
    return peak


def _figures(work_dir: Path, plan: Plan) -> tuple[UnitFigures, ...]:
    seconds, peaks = read_log(work_dir), _peaks(work_dir)
    by_unit = {unit_name(output, plan): output for output in seconds if output.endswith(".o")}
    return tuple(
        UnitFigures(
            name=unit.name,
            members=unit.members,
            seconds=round(seconds[by_unit[unit.name]], 2),
            peak_bytes=peaks.get(by_unit[unit.name], 0),
        )
        for unit in plan.units
        if unit.name in by_unit
    )


_WITH_VALUE = ("-o", "-c", "-x", "-MF", "-MT", "-MQ", "-isystem", "-I")


def _cuda_flags(work_dir: Path) -> list[str]:
    """The flags of the CUDA sources, without what names files or folders."""
    commands = _read(work_dir / "compile_commands.json")
    if not isinstance(commands, list):
        return []
    for entry in sorted(commands, key=lambda entry: str(entry.get("file", ""))):
        if not str(entry.get("file", "")).endswith(".cu"):
            continue
        words = shlex.split(entry["command"])[1:]
        kept = []
        while words:
            word = words.pop(0)
            if word in _WITH_VALUE:
                del words[:1]
            elif not word.startswith(("-I", "-isystem", "--options-file", "-ccbin")):
                kept.append(re.sub(r"(?<=[=,])-f\w+-prefix-map=[^,]*,?", "", word).rstrip(","))
        return kept
    return []


def _install(
    work_dir: Path,
    install_dir: Path,
    toolchain: Toolchain,
    env: Mapping[str, str],
    show: Printer | None,
) -> None:
    recover_folder(install_dir)
    with replaced_folder(install_dir) as fresh:
        try:
            run(
                [toolchain.cmake, "--install", work_dir, "--prefix", fresh, "--strip"],
                env=env,
                show=show,
            )
        except CommandError as error:
            raise BuildError(
                "the built files could not be installed", details=error.output
            ) from error
        if next(walk_files(fresh), None) is None:
            raise BuildError("the bundle installs nothing", hint="see its CMakeLists.txt")
