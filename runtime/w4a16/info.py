"""``w4a16 info``: what is installed, what it was made from, and what it would run on.

Works without a GPU, without a driver, and without the library itself.
"""

from __future__ import annotations

import json
import platform
import re
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w4a16.console import console, cuda, print_rows, size
from w4a16.errors import DeviceError, W4A16Error

if TYPE_CHECKING:
    import typer

    from w4a16.library import Library, Tactic

_PACKAGE = Path(__file__).resolve().parent
_FRAMEWORKS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "jax": ("jax",),
    "numba": ("numba", "numba-cuda"),
}
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def gather() -> dict[str, Any]:
    """Everything, as JSON has it; what could not be found out has ``error`` in its place."""
    library, error = loaded_library()
    return {
        "version": version(),
        "package": str(_PACKAGE),
        "python": platform.python_version(),
        "frameworks": frameworks(),
        "library": _library(library) if library is not None else {"error": error},
        "provenance": provenance(),
        "driver": driver(),
        "gpus": gpus(library),
    }


def version() -> str:
    """Of the installed package; of the library where the package was not installed."""
    found = distribution_version("w4a16")
    if found:
        return found
    library, _ = loaded_library()
    return library.build.version if library is not None else "unknown"


def distribution_version(*names: str) -> str:
    """Of the first of these distributions that is installed, without importing it; or empty."""
    for name in names:
        try:
            return metadata.version(name)
        except (metadata.PackageNotFoundError, TypeError, ValueError):
            continue
    return ""


def frameworks() -> dict[str, str]:
    """Versions of what the package works with, as far as installed."""
    found = {name: distribution_version(*names) for name, names in _FRAMEWORKS.items()}
    return {name: value for name, value in found.items() if value}


def loaded_library() -> tuple[Library | None, str]:
    """The library, or why it cannot be loaded."""
    try:
        from w4a16.library import LIBRARY
    except ImportError as error:
        return None, str(error)
    return LIBRARY, ""


def _library(library: Library) -> dict[str, Any]:
    build = asdict(library.build)
    build.pop("tactic_count")
    build["cuda_runtime"] = cuda(build.pop("cuda_runtime_version"))
    return {
        "path": str(library.path),
        "bytes": library.path.stat().st_size,
        **build,
        "tactics": [_tactic(tactic) for tactic in library.tactics],
    }


def _tactic(tactic: Tactic) -> dict[str, Any]:
    return {
        **asdict(tactic),
        "quant_ops": [op.name.lower() for op in sorted(tactic.quant_ops)],
        "tile": list(tactic.tile),
        "cluster": list(tactic.cluster),
        "groups": list(tactic.groups),
    }


def provenance() -> dict[str, Any] | None:
    """What the wheel says it was made from; None outside of a wheel."""
    path = _PACKAGE / "data" / "provenance.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"error": f"{path}: {error}"}
    return found if isinstance(found, dict) else {"error": f"{path}: not an object"}


def driver() -> dict[str, Any]:
    """The CUDA version that the driver supports, and its own version."""
    try:
        from w4a16 import driver

        supported = driver.driver_version()
    except (ImportError, DeviceError) as error:
        return {"error": str(error)}
    return {"cuda": cuda(supported), "version": _module_version()}


def _module_version() -> str:
    """Of the kernel module: ``580.82.07``; empty where it does not say."""
    try:
        text = _KERNEL_MODULE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else ""


def gpus(library: Library | None) -> list[dict[str, Any]]:
    """Each GPU that the process sees; makes none of them current."""
    try:
        from w4a16 import driver

        count = driver.device_count()
    except (ImportError, DeviceError):
        return []
    return [_gpu(library, device) for device in range(count)]


def _gpu(library: Library | None, device: int) -> dict[str, Any]:
    from w4a16 import driver

    major, minor = driver.compute_capability(device)
    found: dict[str, Any] = {
        "device": device,
        "name": driver.device_name(device),
        "compute_capability": f"{major}.{minor}",
        "sm_count": driver.sm_count(device),
        "memory_bytes": driver.total_memory(device),
        "l2_bytes": driver.l2_bytes(device),
        "compute_mode": driver.compute_mode(device),
    }
    if library is None:
        return found
    found["problem"] = library.device(device).problem
    return {**found, "tactics": _sources(device)}


def _sources(device: int) -> dict[str, Any]:
    """Where the choices of tactics for a GPU come from."""
    try:
        from w4a16 import tactics

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sources = tactics.describe(device)
    except (ImportError, W4A16Error) as error:
        return {"error": str(error)}
    return {
        "shipped": sources.shipped,
        "cache": sources.cache,
        "path": None if sources.path is None else str(sources.path),
        "problems": list(sources.problems),
    }


# ---- For people ----


def show(found: dict[str, Any]) -> None:
    """Prints what :func:`gather` found."""
    out = console()
    library = found["library"]
    rows = [
        ("w4a16", f"{found['version']} in {found['package']}"),
        ("Python", found["python"]),
        ("with", ", ".join(f"{name} {text}" for name, text in found["frameworks"].items())),
    ]
    if "error" in library:
        rows.append(("library", f"none: {library['error']}"))
    else:
        rows += [
            ("library", f"{library['path']} ({size(library['bytes'])})"),
            ("version", f"{library['version']}, C API {library['api_version']}"),
            ("profile", library["profile"]),
            ("TensorRT-LLM", f"{library['release']}, {library['trtllm_commit']}"),
            ("CUTLASS", library["cutlass_commit"]),
            ("bundle", library["bundle_digest"]),
            ("compiler", library["compiler"]),
            ("CUDA runtime", library["cuda_runtime"]),
            ("architecture", library["architecture"]),
            ("no GEMV", library["gemv_reason"]),
        ]
    rows += _provenance_rows(found["provenance"])
    rows += _machine_rows(found)
    print_rows(out, rows)
    if "error" not in library:
        out.print()
        out.print(_tactics_table(library["tactics"]))


def _provenance_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return [("wheel", "no: run from a source tree")]
    if "error" in found:
        return [("wheel", found["error"])]
    project = found.get("project") or {}
    commit = str(project.get("commit") or "an unknown commit")
    changed = ", with changes" if project.get("dirty") else ""
    return [
        ("wheel", f"made from {commit}{changed}"),
        ("policy", str(found.get("policy") or "")),
    ]


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    driver = found["driver"]
    if "error" in driver:
        return [("driver", f"none: {driver['error']}")]
    own = f"{driver['version']}, " if driver["version"] else ""
    rows = [("driver", f"{own}for CUDA up to {driver['cuda']}")]
    if not found["gpus"]:
        rows.append(("GPU", "none that this process sees"))
    for gpu in found["gpus"]:
        text = (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['sm_count']} SMs,"
            f" {size(gpu['memory_bytes'])}"
        )
        if gpu.get("problem"):
            text += f"; cannot run the kernels: {gpu['problem']}"
        rows.append((f"GPU {gpu['device']}", text))
        rows += _source_rows(gpu.get("tactics"))
    return rows


def _source_rows(sources: dict[str, Any] | None) -> list[tuple[str, str]]:
    if sources is None:
        return []
    if "error" in sources:
        return [("  tactics", sources["error"])]
    place = f" ({sources['path']})" if sources["path"] else ""
    return [
        ("  shipped times", sources["shipped"]),
        ("  own times", f"{sources['cache']}{place}"),
        *(("  ignored", problem) for problem in sources["problems"]),
    ]


def _tactics_table(tactics: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"{len(tactics)} tactics", title_justify="left")
    for head in ("name", "kind", "tile N×M×K", "cluster", "schedule", "M", "group sizes", "scales"):
        table.add_column(head, no_wrap=head == "name")
    for tactic in tactics:
        table.add_row(
            tactic["name"],
            tactic["kind"],
            _extents(tactic["tile"]),
            _extents(tactic["cluster"]),
            tactic["schedule"],
            _rows_text(tactic["m_min"], tactic["m_max"]),
            _groups_text(tactic),
            ", ".join(tactic["quant_ops"]),
        )
    return table


def _extents(values: list[int]) -> str:
    return "×".join(map(str, values)) if any(values) else "-"


def _rows_text(least: int, most: int) -> str:
    return f"{least} and more" if most >= 2**31 - 1 else f"{least} to {most}"


def _groups_text(tactic: dict[str, Any]) -> str:
    if tactic["group_multiple"]:
        return f"multiples of {tactic['group_multiple']}"
    return ", ".join(map(str, tactic["groups"])) or "-"


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 info``."""
    import typer

    as_json = typer.Option(False, "--json", help="Print JSON.")

    @app.command("info")
    def command(json_: bool = as_json) -> None:
        """Show the library, what it was made from, its tactics, the driver and the GPUs."""
        found = gather()
        if json_:
            print(json.dumps(found, indent=1))
        else:
            show(found)
