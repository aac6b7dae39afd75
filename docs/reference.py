"""Writes ``api.md`` from the docstrings of the package's public names: python docs/reference.py"""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - some of the names need it
import w4a16

PAGE = Path(__file__).resolve().parent / "api.md"

_SECTIONS = {
    "Packing": ("pack", "unpack", "dequantize", "PackedWeight", "Unpacked"),
    "Calling": ("linear", "register_torch_ops", "DeviceArray"),
    "Models": ("convert", "W4A16Linear", "replace_linears", "load_converted"),
    "Checkpoint formats": ("QuantizationConfig", "LayerConfig"),
    "Tactics": ("tactic_names", "tune", "set_overlap", "QuantOp"),
    "The library": ("library_path", "include_dir", "cmake_dir"),
}
_HEAD = """\
# API reference

Made from the docstrings by `python docs/reference.py`; `help(w4a16.pack)` shows the same. All names
are imported from `w4a16`, those of the fused projections from `w4a16.fused`.
"""


_TABLE = re.compile(r"^(?P<first>=+) =+\n(?P<rows>.*?)\n=+ =+$", re.MULTILINE | re.DOTALL)


def page() -> str:
    """The text of ``api.md``."""
    named = {name for names in _SECTIONS.values() for name in names} | {"fused"}
    errors = sorted(set(w4a16.__all__) - named)
    parts = [_HEAD]
    for title, names in {**_SECTIONS, "Errors and warnings": tuple(errors)}.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name, getattr(w4a16, name)) for name in names]
    parts += ["## w4a16.fused\n", _doc(w4a16.fused), ""]
    parts += [_entry(name, getattr(w4a16.fused, name)) for name in w4a16.fused.__all__]
    parts += ["## torch.ops.w4a16\n", _doc(inspect.getmodule(w4a16.register_torch_ops)), ""]
    parts += [_doc(import_module("w4a16.fused_ops")), ""]
    return "\n".join(parts).rstrip() + "\n"


def _entry(name: str, value: Any) -> str:
    lines = [f"### `{name}{_signature(value)}`\n", _doc(value), ""]
    if inspect.isclass(value) and not issubclass(value, Exception):
        if dataclasses.is_dataclass(value):
            fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(value))
            lines += [f"Fields: {fields}.", ""]
        for key, member in vars(value).items():
            found = getattr(member, "__func__", member)
            doc = _doc(found) if found.__doc__ else ""  # not what it inherits
            if key.startswith("_") or not doc or not _is_documented(found):
                continue
            lines += [f"- **`{key}{_signature(found)}`**: {doc}"]
        lines.append("")
    return "\n".join(lines)


def _is_documented(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property)


def _signature(value: Any) -> str:
    if isinstance(value, property) or (inspect.isclass(value) and issubclass(value, Exception)):
        return ""
    if inspect.isclass(value) and (dataclasses.is_dataclass(value) or issubclass(value, int)):
        return ""
    text = str(inspect.signature(value))
    return re.sub(r"(self, |self|cls, )", "", text, count=1).replace("'", "")


def _doc(value: Any) -> str:
    text = _TABLE.sub(_markdown, inspect.getdoc(value) or "")
    text = re.sub(r":(?:class|func|meth|attr|data|mod):`~?\.?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _markdown(table: re.Match[str]) -> str:
    """A table of two columns, which begin where its frame says."""
    begin = len(table["first"]) + 1
    cells = [(line[:begin].strip(), line[begin:].strip()) for line in table["rows"].splitlines()]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in cells)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
