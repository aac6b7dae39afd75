"""What changed between two releases: from their manifests, as data and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Manifest = Mapping[str, Any]
Change = dict[str, Any]


def compare(old: Manifest, new: Manifest) -> Change:
    """Instantiations, GEMV kernels, tactics, vendored files and sizes: added, removed, changed."""
    return {
        "from": {"release": old["release"], **_commits(old)},
        "to": {"release": new["release"], **_commits(new)},
        "instantiations": _keyed(_instantiations(old), _instantiations(new)),
        "considered": {
            "from": len(old["selected"]) + len(old["dropped"]),
            "to": len(new["selected"]) + len(new["dropped"]),
        },
        "gemv": {
            **_keyed(_gemv(old), _gemv(new)),
            "reason": {"from": old["gemv"]["reason"], "to": new["gemv"]["reason"]},
        },
        "tactics": _keyed(dict.fromkeys(_tactics(old), ""), dict.fromkeys(_tactics(new), "")),
        "vendored": _keyed(_vendored(old), _vendored(new)),
        "library_bytes": {"from": _library_bytes(old), "to": _library_bytes(new)},
    }


def as_markdown(change: Change) -> str:
    """The comparison for people; empty sections say so."""
    old, new = change["from"], change["to"]
    lines = [
        f"# From {old['release']} to {new['release']}",
        "",
        f"- TensorRT-LLM {old['trtllm'][:12]} to {new['trtllm'][:12]}",
        f"- CUTLASS {old['cutlass'][:12]} to {new['cutlass'][:12]}",
        f"- mixed-input instantiations upstream: {change['considered']['from']} "
        f"to {change['considered']['to']}",
        f"- library: {_bytes(change['library_bytes']['from'])} "
        f"to {_bytes(change['library_bytes']['to'])}",
    ]
    reason = change["gemv"]["reason"]
    if reason["from"] != reason["to"]:
        lines.append(
            f"- GEMV: {reason['from'] or 'present'} (before); {reason['to'] or 'present'} (now)"
        )
    for title, key in (
        ("Tactics", "tactics"),
        ("Instantiations", "instantiations"),
        ("GEMV kernels", "gemv"),
        ("Vendored files", "vendored"),
    ):
        lines += ["", f"## {title}", *_section(change[key])]
    return "\n".join(lines) + "\n"


def _section(part: Change) -> Iterable[str]:
    yield (
        f"{len(part['added'])} added, {len(part['removed'])} removed, "
        f"{len(part['changed'])} changed, {part['same']} the same"
    )
    for word in ("added", "removed"):
        yield from (f"- {word}: {name}" for name in part[word])
    for name, what in part["changed"].items():
        yield f"- changed: {name}" + (f" ({', '.join(what)})" if what else "")


def _keyed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    common = sorted(old.keys() & new.keys())
    changed = {name: _fields(old[name], new[name]) for name in common if old[name] != new[name]}
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": changed,
        "same": len(common) - len(changed),
    }


def _fields(old: Any, new: Any) -> list[str]:
    """Which fields differ, with both values; nothing for values that say nothing (digests)."""
    if not isinstance(old, dict):
        return []
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _instantiations(manifest: Manifest) -> dict[str, Any]:
    """Kept instantiations by identifier; where they stand in generated files is no change."""
    return {
        entry["ident"]: {key: value for key, value in entry.items() if key != "origin"}
        for entry in manifest["selected"]
    }


def _gemv(manifest: Manifest) -> dict[str, Any]:
    return {
        f"{family['ident']} M={kernel['m']}": {**kernel, "details": family["details"]}
        for family in manifest["gemv"]["selected"]
        for kernel in family["kernels"]
    }


def _tactics(manifest: Manifest) -> set[str]:
    gemv = {"gemv"} if manifest["gemv"]["selected"] else set()
    # The first manifests had none.
    decode = {entry["name"] for entry in manifest.get("decode", {}).get("selected", ())}
    return {entry["tactic"] for entry in manifest["selected"]} | gemv | decode


def _vendored(manifest: Manifest) -> dict[str, str]:
    return {entry["path"]: entry["sha256"] for entry in manifest["vendored"]}


def _commits(manifest: Manifest) -> dict[str, str]:
    return {name: manifest["sources"][name]["commit"] for name in ("trtllm", "cutlass")}


def _library_bytes(manifest: Manifest) -> int | None:
    value = manifest.get("verification", {}).get("library_bytes")
    return None if value is None else int(value)


def _bytes(value: int | None) -> str:
    return "not built" if value is None else f"{value:,} bytes"
