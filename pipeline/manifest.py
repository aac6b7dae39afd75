"""``DIR/manifest.json``: what was kept, dropped and made, extended by each stage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.files import read_json, write_json
from pipeline.model import (
    Bundle,
    Checkout,
    Closure,
    Dropped,
    GemmKernel,
    GeneratedTree,
    Selection,
    Sources,
    shape_text,
)
from pipeline.profile import Profile

NAME = "manifest.json"


def extracted(
    profile: Profile,
    sources: Sources,
    tree: GeneratedTree,
    selection: Selection,
    closure: Closure,
    bundle: Bundle,
) -> dict[str, Any]:
    """The manifest as stage *extract* leaves it; later stages add keys of their own."""
    return {
        "pipeline": __version__,
        "release": sources.release,
        "profile": profile.model_dump(mode="json", by_alias=True),
        "sources": {
            "trtllm": _source(sources.trtllm),
            "cutlass": _source(sources.cutlass),
            "matches_lock": sources.matches_lock,
        },
        "generator": {"command": tree.command, "files": tree.files},
        "selected": [_kernel(kernel) for kernel in selection.selected],
        "dropped": [_dropped(entry) for entry in selection.dropped],
        "ignored": [_dropped(entry) for entry in selection.ignored],
        "gemv": {
            "selected": [
                {**asdict(family), "kernels": [asdict(kernel) for kernel in family.kernels]}
                for family in selection.gemv.selected
            ],
            "dropped": [_dropped(entry) for entry in selection.gemv.dropped],
            "reason": selection.gemv.reason,
        },
        "decode": {
            "selected": [
                {
                    "name": tactic.name,
                    **asdict(tactic),
                    "kernels": [asdict(kernel) for kernel in tactic.kernels],
                }
                for tactic in selection.decode.selected
            ],
            "reason": selection.decode.reason,
        },
        "vendored": [asdict(file) for file in closure.files],
        "shims": list(closure.shims),
        "bundle": {"digest": bundle.digest, "files": len(bundle.files)},
    }


def write(run_dir: Path, values: dict[str, Any]) -> None:
    write_json(run_dir / NAME, values)


def extend(run_dir: Path, **more: Any) -> None:
    """Add what a later stage knows."""
    write_json(run_dir / NAME, {**read(run_dir), **more})


def read(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(run_dir / NAME)
    return values


def _source(checkout: Checkout) -> dict[str, Any]:
    values = asdict(checkout)
    del values["folder"], values["name"]
    return values


def _dropped(entry: Dropped) -> dict[str, Any]:
    return asdict(entry)


def _kernel(kernel: GemmKernel) -> dict[str, Any]:
    found = kernel.instantiation
    return {
        "ident": kernel.ident,
        "tactic": kernel.tactic,
        "quant_op": kernel.quant_op,
        "types": {
            "activation": found.act,
            "weight": found.weight,
            "scale_zero": found.scale_zero,
            "bias": found.bias,
            "output": found.out,
        },
        "cta_tile": shape_text(found.cta),
        "cluster": shape_text(found.cluster),
        "mainloop_schedule": found.mainloop,
        "epilogue_schedule": found.epilogue_schedule,
        "epilogue": found.epilogue,
        "origin": f"{found.origin}:{found.line}",
    }
