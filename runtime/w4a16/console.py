"""Where the commands print."""

from __future__ import annotations

from typing import Any

_WIDE = 160


def console(*, stderr: bool = False) -> Any:
    """A rich console for plain text: a file or a pipe is as wide as a table needs, and nothing in
    the text is markup."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = max(made.width, _WIDE)
    return made


def print_rows(out: Any, rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns; rows without a value are left out."""
    rows = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        out.print(f"{name:{width}}  {value}", soft_wrap=True)


def size(count: int) -> str:
    """Bytes as GiB, MiB or KiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def cuda(version: int) -> str:
    """``13.0`` for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
