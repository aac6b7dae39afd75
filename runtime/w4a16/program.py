"""Whether this process is the program ``w4a16``, which goes on where the package cannot."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import PurePath

_MODULES = ("w4a16", "w4a16.cli")


def is_program() -> bool:
    """``w4a16 …`` or ``python -m w4a16 …``: without its library the package is no use to any other
    process, but ``w4a16 doctor`` has to say what to do about it."""
    name = next(iter(getattr(sys, "argv", [])), "")
    if name != "-m":
        return PurePath(name).name == "w4a16"
    # The interpreter is still looking for the module that it was asked to run.
    given = sys.orig_argv
    pairs = pairwise(given)
    return any(one == "-m" and two in _MODULES for one, two in pairs) or any(
        f"-m{module}" in given for module in _MODULES
    )
