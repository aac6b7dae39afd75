"""What the package's binding offers beyond a plain launch: the one place that asks.

Version 3 of the C API has a flag for programmatic dependent launch; with an older library or
package there are plain launches only.
"""

from __future__ import annotations

import inspect
from typing import Any

_RUN_OVERLAP = 1


def overlap_arguments(run: Any) -> dict[str, Any] | None:
    """What ``LIBRARY.run`` is to be given for an overlapped launch; None if it takes nothing."""
    parameters = inspect.signature(run).parameters
    if "overlap" in parameters:
        return {"overlap": True}
    if "flags" in parameters:
        return {"flags": _RUN_OVERLAP}
    return None


def overlaps(tactic: Any) -> bool:
    """Whether a tactic heeds the flag, as far as the binding says."""
    return bool(getattr(tactic, "overlap", tactic.kind == "decode"))


def why_no_overlap(library: Any) -> str:
    """Why nothing is launched with overlap; empty if something is."""
    if library.build.api_version < 3:
        return f"the library has version {library.build.api_version} of the C API, overlap needs 3"
    if overlap_arguments(library.run) is None:
        return "this package's binding passes no launch flags"
    if not any(overlaps(tactic) for tactic in library.tactics):
        return "no tactic of this library knows overlap"
    return ""
