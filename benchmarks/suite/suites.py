"""The suites that ``--suite NAME`` knows: each is a command of its own, loaded when it is named.

A suite is a function of the arguments that are left, returning an exit code. To add one, name it
here; cases, contenders and results of its own may use what this package has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

from benchmarks.suite.errors import UsageError

Main: TypeAlias = Callable[[Sequence[str]], int]

#: ``module:function`` by name; the first is run when none is named.
SUITES = {"linear": "benchmarks.suite.run:main", "fusion": "benchmarks.fusion:main"}


def find(name: str) -> Main:
    """The suite's function; raises :class:`UsageError`."""
    place = SUITES.get(name)
    if place is None:
        raise UsageError(f"--suite {name}: expected {' or '.join(SUITES)}")
    module, _, function = place.partition(":")
    return cast(Main, getattr(importlib.import_module(module), function))


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The suite that is named, and the other arguments; raises :class:`UsageError`."""
    name, rest = next(iter(SUITES)), []
    waiting = False
    for argument in arguments:
        if waiting:
            name, waiting = argument, False
        elif argument == "--suite":
            waiting = True
        elif argument.startswith("--suite="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if waiting:
        raise UsageError(f"--suite needs a name: {' or '.join(SUITES)}")
    return name, rest
