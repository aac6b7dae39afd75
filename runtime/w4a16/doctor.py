"""``w4a16 doctor``: what keeps the package from working here, and what to do about it.

Each check is a function that yields findings. None of them raises, not even where the library
cannot be loaded: that is a finding.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from w4a16 import info
from w4a16.console import console, cuda, size
from w4a16.errors import DeviceError, W4A16Error

if TYPE_CHECKING:
    import typer

    from w4a16.library import Library

State: TypeAlias = Literal["ok", "warning", "error"]

_PACKAGE = Path(__file__).resolve().parent
_LITTLE_MEMORY = 2 << 30
_OLDEST_TORCH = (2, 4)
_MAPS = Path("/proc/self/maps")
#: As in ``w4a16.timing``: beyond this relative error a result is wrong, not rounded.
_WRONG = 3e-3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    found: str
    advice: str = ""
    """What to do; empty if all is well."""


def examine() -> list[Finding]:
    """Runs all checks."""
    library, error = info.loaded_library()
    machine = Machine(library, error)
    return [finding for check in _CHECKS for finding in _run(check, machine)]


@dataclass(frozen=True)
class Machine:
    """What the checks share."""

    library: Library | None
    import_error: str

    def gpus(self) -> list[int]:
        """Ordinals of GPUs that the library runs on."""
        if self.library is None:
            return []
        try:
            from w4a16 import driver

            count = driver.device_count()
        except (ImportError, DeviceError):
            return []
        return [device for device in range(count) if not self.library.device(device).problem]


Check: TypeAlias = Callable[[Machine], Iterator[Finding]]


def _run(check: Check, machine: Machine) -> Iterator[Finding]:
    name = check.__name__.lstrip("_").replace("_", " ")
    try:
        yield from check(machine)
    except Exception as error:  # one that fails is no reason to keep the others
        yield Finding(
            check=name,
            state="error",
            found=f"the check itself failed: {type(error).__name__}: {error}",
            advice="report this, with what W4A16_DEBUG=1 w4a16 doctor prints",
        )
        if os.environ.get("W4A16_DEBUG") == "1":
            raise


# ---- The package ----


def _python(machine: Machine) -> Iterator[Finding]:
    try:
        import numpy
    except Exception as error:
        yield Finding(
            check="numpy",
            state="error",
            found=f"numpy cannot be imported: {error}",
            advice=f"{sys.executable} -m pip install numpy",
        )
        return
    yield Finding(check="numpy", state="ok", found=f"numpy {numpy.__version__}")


def _installation(machine: Machine) -> Iterator[Finding]:
    places = set()
    for found in metadata.distributions():
        if (found.name or "").lower() == "w4a16":
            places.add(str(Path(str(found.locate_file(""))).resolve()))
    installed = info.distribution_version("w4a16")
    own = machine.library.build.version if machine.library else ""
    if len(places) > 1:
        yield Finding(
            check="installation",
            state="warning",
            found=f"w4a16 is installed {len(places)} times: {', '.join(sorted(places))}",
            advice="uninstall all but one (pip uninstall w4a16, once for each)",
        )
    elif places and _PACKAGE.parent not in map(Path, places):
        yield Finding(
            check="installation",
            state="warning",
            found=f"{_PACKAGE} is used, though w4a16 is installed in {places.pop()}",
            advice="look for a folder w4a16 in the working directory or PYTHONPATH",
        )
    elif installed and own and installed != own:
        yield Finding(
            check="installation",
            state="warning",
            found=f"the package is version {installed}, the library is version {own}",
            advice="install the wheel anew, or unset W4A16_LIBRARY",
        )
    else:
        place = "installed" if places else "run from a source tree"
        yield Finding(check="installation", state="ok", found=f"{place}: {_PACKAGE}")


def _library(machine: Machine) -> Iterator[Finding]:
    library = machine.library
    if library is None:
        advice = "install the wheel anew (pip install --force-reinstall w4a16-*.whl)"
        if os.environ.get("W4A16_LIBRARY"):
            advice = "unset W4A16_LIBRARY, or set it to a libw4a16.so of this version"
        yield Finding(check="library", state="error", found=machine.import_error, advice=advice)
        return
    build = library.build
    yield Finding(
        check="library",
        state="ok",
        found=f"{library.path}: version {build.version}, C API {build.api_version},"
        f" {len(library.tactics)} tactics for {build.architecture}",
    )
    if build.gemv_reason:
        yield Finding(
            check="library",
            state="warning",
            found=f"it has no GEMV: {build.gemv_reason}",
            advice="products with few rows are slower; build it from a release that is supported",
        )


def _override(machine: Machine) -> Iterator[Finding]:
    given = os.environ.get("W4A16_LIBRARY") if machine.library else None
    own = _PACKAGE / "lib" / "libw4a16.so"
    if given and own.is_file():
        yield Finding(
            check="W4A16_LIBRARY",
            state="warning",
            found=f"{given} is used instead of the package's own library",
            advice="unset W4A16_LIBRARY unless that is meant",
        )
    elif given:
        yield Finding(check="W4A16_LIBRARY", state="ok", found=f"{given}; the package has none")


def _copies(machine: Machine) -> Iterator[Finding]:
    """Several copies of the library in this process."""
    paths = loaded_copies()
    if len(paths) > 1:
        yield Finding(
            check="copies",
            state="warning",
            found=f"{len(paths)} libraries are loaded: {', '.join(paths)}",
            advice="something preloads another one: look at LD_PRELOAD and W4A16_LIBRARY",
        )


def loaded_copies() -> list[str]:
    """Files named libw4a16.so that this process has mapped."""
    try:
        text = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/libw4a16[^/\s]*\.so[.\d]*)$", text, re.MULTILINE)))


# ---- The machine ----


def _driver(machine: Machine) -> Iterator[Finding]:
    runtime = machine.library.build.cuda_runtime_version if machine.library else 0
    try:
        from w4a16 import driver

        supported = driver.driver_version()
    except ImportError:
        return  # numpy; said above
    except DeviceError as error:
        what, _, step = str(error).partition("; ")
        step = step.replace("install one", f"install one ({_branch(runtime)})")
        yield Finding(check="driver", state="error", found=what, advice=step)
        return
    own = info.driver().get("version") or ""
    found = f"{own + ', ' if own else ''}for CUDA up to {cuda(supported)}"
    if supported // 1000 < runtime // 1000:
        yield Finding(
            check="driver",
            state="error",
            found=f"{found}; the library was built with CUDA {cuda(runtime)}",
            advice=f"install a newer driver ({_branch(runtime)}), or a library that was built with"
            f" CUDA {supported // 1000}",
        )
        return
    yield Finding(check="driver", state="ok", found=found)


def _branch(runtime: int) -> str:
    """The first branch of drivers that runs a CUDA runtime, by NVIDIA's compatibility tables."""
    return {12: "525 or later", 13: "580 or later"}.get(runtime // 1000, "the newest")


def _gpu(machine: Machine) -> Iterator[Finding]:
    try:
        from w4a16 import driver

        driver.driver_version()
    except (ImportError, DeviceError):
        return  # said above
    try:
        count = driver.device_count()
    except DeviceError as error:
        what, _, step = str(error).partition("; ")
        yield Finding(check="GPU", state="error", found=what, advice=step or "see nvidia-smi")
        return
    usable = machine.gpus()
    for device in range(count):
        yield from _one_gpu(machine, device, bool(usable))


def _one_gpu(machine: Machine, device: int, others: bool) -> Iterator[Finding]:
    from w4a16 import driver

    check = f"GPU {device}"
    major, minor = driver.compute_capability(device)
    name = f"{driver.device_name(device)}, compute capability {major}.{minor}"
    problem = machine.library.device(device).problem if machine.library else ""
    if problem:
        yield Finding(
            check=check,
            state="warning" if others else "error",
            found=f"{name}: {problem}",
            advice="choose another GPU"
            if others
            else "the kernels run on Hopper only (H100, H200, GH200); packing and converting work",
        )
        return
    mode = driver.compute_mode(device)
    if mode == "prohibited":
        yield Finding(
            check=check,
            state="error",
            found=f"{name}: its compute mode is prohibited, so that nothing can run",
            advice=f"nvidia-smi -i {device} -c DEFAULT",
        )
        return
    try:
        with driver.use_device(device):
            free, total = driver.memory_info()
    except DeviceError as error:
        yield Finding(
            check=check,
            state="error",
            found=f"{name}: {error}",
            advice="another process holds it alone: see nvidia-smi"
            if mode == "exclusive"
            else "see nvidia-smi",
        )
        return
    found = f"{name}, {driver.sm_count(device)} SMs, {size(free)} of {size(total)} free"
    if free < _LITTLE_MEMORY:
        yield Finding(
            check=check,
            state="warning",
            found=found,
            advice="little memory is left: see nvidia-smi for who holds it",
        )
    elif mode == "exclusive":
        yield Finding(
            check=check,
            state="warning",
            found=f"{found}; its compute mode is exclusive",
            advice="only one process at a time can use it",
        )
    else:
        yield Finding(check=check, state="ok", found=found)
    if "MIG" in driver.device_name(device):
        yield Finding(
            check=check,
            state="warning",
            found=f"it is a part of a GPU (MIG) with {driver.sm_count(device)} SMs",
            advice="times measured on a whole GPU do not hold here: run w4a16 tune",
        )


def _product(machine: Machine) -> Iterator[Finding]:
    """One small product on each GPU, against the CPU."""
    for device in machine.gpus():
        try:
            error = _relative_error(device)
        except W4A16Error as failure:
            yield Finding(
                check="product",
                state="error",
                found=f"a small product on GPU {device} failed: {failure}",
                advice="run it again with CUDA_LAUNCH_BLOCKING=1 W4A16_DEBUG=1",
            )
            continue
        if error <= _WRONG:
            found = f"a small product on GPU {device} is right (relative error {error:.1e})"
            yield Finding(check="product", state="ok", found=found)
        else:
            yield Finding(
                check="product",
                state="error",
                found=f"a small product on GPU {device} has a relative error of {error:.1e}",
                advice="run w4a16 check, and report what it prints",
            )


def _relative_error(device: int) -> float:
    import numpy as np

    from w4a16.arrays import DeviceArray
    from w4a16.linear import linear
    from w4a16.packing import pack

    random = np.random.default_rng(0)
    q = random.integers(0, 16, (256, 64), np.uint8)
    scales = np.exp2(random.uniform(-9, -7, (2, 64))).astype(np.float16)
    x = random.standard_normal((5, 256)).astype(np.float16)
    on_cpu = pack(q=q, scales=scales, group_size=128)
    on_gpu = pack(q=q, scales=scales, group_size=128, device=device)
    result = linear(DeviceArray.from_numpy(x, device), on_gpu).numpy().astype(np.float64)
    right = linear(x, on_cpu).astype(np.float64)
    error = float(np.linalg.norm(result - right) / np.linalg.norm(right))
    return error if error == error else float("inf")


# ---- What is around ----


def _torch(machine: Machine) -> Iterator[Finding]:
    installed = info.distribution_version("torch")
    if not installed:
        found = "not installed; arrays of numpy, CuPy, JAX and numba work without it"
        yield Finding(check="torch", state="ok", found=found)
        return
    try:
        import torch
    except Exception as error:
        yield Finding(
            check="torch",
            state="error",
            found=f"torch {installed} cannot be imported: {error}",
            advice="install torch anew, or uninstall it",
        )
        return
    label = f"torch {torch.__version__}"
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < _OLDEST_TORCH:
        yield Finding(
            check="torch",
            state="warning",
            found=label,
            advice=f"torch.ops.w4a16 needs {'.'.join(map(str, _OLDEST_TORCH))} or later",
        )
        return
    if machine.library is None:
        return
    try:
        from w4a16.torch_ops import register_torch_ops

        register_torch_ops()
        torch.ops.w4a16.linear.default  # noqa: B018
    except Exception as error:
        yield Finding(
            check="torch",
            state="error",
            found=f"{label}: torch.ops.w4a16 cannot be registered: {error}",
            advice="report this; w4a16.linear works with arrays of other frameworks",
        )
        return
    built_for = torch.version.cuda
    if built_for is None:
        yield Finding(
            check="torch",
            state="warning",
            found=f"{label} is a build without CUDA",
            advice="install one with CUDA (see pytorch.org) to run models on the GPU",
        )
    elif machine.gpus() and not torch.cuda.is_available():
        yield Finding(
            check="torch",
            state="warning",
            found=f"{label} for CUDA {built_for} sees no GPU, though the driver has one",
            advice="python -c 'import torch; torch.cuda.init()' says why",
        )
    else:
        found = f"{label} for CUDA {built_for}; torch.ops.w4a16 is registered"
        yield Finding(check="torch", state="ok", found=found)


def _tactics(machine: Machine) -> Iterator[Finding]:
    """The tables of measured times."""
    if machine.library is None:
        return
    from w4a16 import tactics

    for device in machine.gpus():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sources = tactics.describe(device)
        for problem in sources.problems:
            yield Finding(
                check="tactics",
                state="warning",
                found=problem,
                advice="run w4a16 tune to write it anew, or delete the file",
            )
        measured = sources.shipped.startswith("none") is False
        tuned = sources.path is not None and sources.path.is_file() and not sources.problems
        yield Finding(
            check="tactics",
            state="ok" if measured or tuned else "warning",
            found=f"GPU {device}: shipped times: {sources.shipped}; own times: {sources.cache}",
            advice="" if measured or tuned else "run w4a16 tune to choose by measuring",
        )


def _cache(machine: Machine) -> Iterator[Finding]:
    if machine.library is None:
        return
    from w4a16 import cache

    place, reason = cache.folder()
    if place is None:
        yield Finding(
            check="cache",
            state="warning",
            found=f"what w4a16 tune measures is not kept: {reason}",
            advice=f"set {cache.ENVIRONMENT} to a folder, if it should be",
        )
        return
    problem = not_writable(place)
    if problem:
        yield Finding(
            check="cache",
            state="warning",
            found=f"what w4a16 tune measures cannot be kept: {problem}",
            advice=f"set {cache.ENVIRONMENT} to a folder that can be written to",
        )
    else:
        yield Finding(check="cache", state="ok", found=f"{place} can be written to")


def not_writable(place: Path) -> str:
    """Why no file can be made in a folder that may not exist yet; empty if one can."""
    for folder in (place, *place.parents):
        if folder.is_dir():
            if os.access(folder, os.W_OK | os.X_OK):
                return ""
            return f"no permission to write to {folder}"
        if folder.exists() or folder.is_symlink():
            return f"{folder} is not a folder"
    return f"{place} has no parent"


def _environment(machine: Machine) -> Iterator[Finding]:
    """Variables that make everything slow or strange."""
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Finding(
            check="CUDA_LAUNCH_BLOCKING",
            state="warning",
            found="it is set, so that every launch waits for the GPU",
            advice="unset it, unless an error is being looked for",
        )


_CHECKS: tuple[Check, ...] = (
    *(_python, _installation, _library, _override, _copies),
    *(_driver, _gpu, _product),
    *(_torch, _tactics, _cache, _environment),
)


# ---- For people ----


def failed(findings: list[Finding]) -> bool:
    return any(finding.state == "error" for finding in findings)


def show(findings: list[Finding]) -> None:
    """Prints a line for each finding, and what to do under it."""
    out = console()
    width = max(len(finding.check) for finding in findings)
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for finding in findings:
        head = f"{finding.state:7}  {finding.check:{width}}  "
        out.print(head, style=colours[finding.state], end="")
        out.print(finding.found, soft_wrap=True)
        if finding.advice:
            out.print(f"{'':{len(head)}}→ {finding.advice}", soft_wrap=True)
    counts = {state: sum(f.state == state for f in findings) for state in ("error", "warning")}
    if not any(counts.values()):
        out.print("everything is as it should be")
    else:
        out.print(
            ", ".join(f"{n} {state}{'' if n == 1 else 's'}" for state, n in counts.items() if n)
        )


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 doctor``."""
    import typer

    as_json = typer.Option(False, "--json", help="Print JSON.")

    @app.command("doctor")
    def command(json_: bool = as_json) -> None:
        """Find what is wrong with this installation or machine, and say what to do."""
        findings = examine()
        if json_:
            values = [asdict(finding) for finding in findings]
            print(json.dumps({"ok": not failed(findings), "findings": values}, indent=1))
        else:
            show(findings)
        if failed(findings):
            raise typer.Exit(1)
