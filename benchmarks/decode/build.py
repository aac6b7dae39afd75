"""Compiles the kernels and the harness with nvcc, one unit for each configuration, in parallel."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode.configurations import Configuration, table, unit

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_KERNELS = _ROOT / "kernels" / "decode"
_INCLUDES = (_HERE, _KERNELS, _ROOT / "templates" / "bundle" / "src")  # the last for driver.h
_TARGET = "-gencode=arch=compute_90a,code=sm_90a"
_SPILLS = re.compile(r"(\d+) bytes spill stores")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALISED = re.compile(r"\bC75\d\d\b")  # ptxas: wgmma instructions wait for one another


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    spill_bytes: int
    serialised: bool


class BuildError(Exception):
    """nvcc failed; the message is what it said."""


def build(
    configurations: Sequence[Configuration], folder: Path, nvcc: str
) -> tuple[Path, dict[str, Resources]]:
    """The harness with these kernels, and the resources of each by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    units = {c.name: folder / f"{c.name}.cu" for c in configurations}
    for c in configurations:
        units[c.name].write_text(unit(c))
    listed = folder / "table.cpp"
    listed.write_text(table(tuple(configurations)))
    others = (_HERE / "bench.cu", _KERNELS / "launch.cpp", listed)
    sources = (others[0], *units.values(), *others[1:])  # the slowest first

    def compile_one(source: Path) -> str:
        compiled = folder / f"{source.stem}.o"
        includes = [f"-I{folder}" for folder in _INCLUDES]
        options = ("-std=c++17", "-O3", _TARGET, "-Xptxas=-v", *includes)
        return _run(nvcc, *options, "-c", "-o", str(compiled), str(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = dict(zip(sources, pool.map(compile_one, sources), strict=True))
    program = folder / "bench"
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    _run(nvcc, _TARGET, "-cudart=static", "-o", str(program), *objects)
    return program, {name: _resources(said[source]) for name, source in units.items()}


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}. Name it with --nvcc.") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _resources(said: str) -> Resources:
    registers = [int(found) for found in _REGISTERS.findall(said)]
    spills = [int(found) for found in _SPILLS.findall(said)]
    return Resources(max(registers), max(spills), _SERIALISED.search(said) is not None)
