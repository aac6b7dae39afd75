"""What a contender is: something that prepares a weight, and then multiplies with it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.suite.cases import Job
from benchmarks.suite.errors import Missing
from benchmarks.suite.gpu import Launch
from benchmarks.suite.results import Role
from benchmarks.suite.weights import Rows, Weights

#: A result is wrong beyond this relative Frobenius error: the largest that upstream's GEMV, which
#: sums in FP16, makes with zeros and 28672 inputs is 2.3e-3; a wrong element or layout gives more.
LIMIT = 3e-3
#: For contenders that take and give BF16, whose rounding alone is 2e-3.
LIMIT_BF16 = 1e-2


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to compute a case."""

    contender: str
    role: Role
    launch: Launch
    """Launch i uses slot ``i mod slots`` of the activations; its output is that slot of the
    outputs, or what it returns."""
    overlap: bool = False
    kind: str = ""
    """Of a tactic of this library, whose many runs go through a short first pass."""
    limit: float = LIMIT
    torch_graph: bool = True
    """Whether the launch allocates through torch, so that torch must make the graph."""
    note: str = ""

    @property
    def label(self) -> str:
        return self.contender + (" + overlap" if self.overlap else "")


class Prepared(Protocol):
    """A contender's form of one weight."""

    def runs(self, rows: Rows) -> Sequence[Run]:
        """Ways to multiply these rows with it; raises :class:`Missing` if there is none."""
        ...


class Contender(Protocol):
    """Loads what it needs only when it is asked for its version."""

    @property
    def name(self) -> str: ...

    def version(self) -> str:
        """Its version; raises :class:`Missing` if it cannot take part."""
        ...

    def warm(self, jobs: Sequence[Job]) -> None:
        """Compiles what these jobs will need, in a thread of its own; may do nothing."""
        ...

    def prepare(self, weights: Weights) -> Prepared:
        """Its form of a weight; raises :class:`Missing` for one that it does not take."""
        ...


def load(module: str, distribution: str = "") -> Any:
    """A module; raises :class:`Missing` with the reason."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        name = distribution or module
        raise Missing(f"{name} cannot be imported: {brief(error)}") from None


def version_of(distribution: str) -> str:
    """Of an installed distribution, or ``unknown``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def brief(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def nibbles(values: Any) -> Any:
    """int32 ``[..., C / 8]`` of uint8 ``[..., C]``: eight values a word, the first lowest."""
    words = values[..., 0::8].int()
    for i in range(1, 8):
        words |= values[..., i::8].int() << (4 * i)
    return words
