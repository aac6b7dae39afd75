"""Launches on the device, with poisoned memory around everything that the library may write."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from . import reference
from .library import Args, Library, Problem, QuantOp, Tactic, problem
from .reference import OFFSET, SENTINEL, Tensor, Weights, torch


class Guarded:
    """A device buffer between two poisoned bands, itself poisoned whenever it is armed."""

    def __init__(self, byte_count: int) -> None:
        self._storage = torch.empty(
            byte_count // 2 + 2 * OFFSET, dtype=torch.int16, device=reference.DEVICE
        )
        self._count = 0

    def arm(self, byte_count: int) -> None:
        """Poisons ``byte_count`` bytes and the bands; an even number."""
        assert byte_count % 2 == 0
        self._count = byte_count // 2
        assert self._count + 2 * OFFSET <= self._storage.numel()
        self._storage[: self._count + 2 * OFFSET].fill_(SENTINEL)

    @property
    def capacity(self) -> int:
        return (int(self._storage.numel()) - 2 * OFFSET) * 2

    @property
    def address(self) -> int:
        return int(self._storage.data_ptr()) + OFFSET * 2

    @property
    def inside(self) -> Tensor:
        return self._storage[OFFSET : OFFSET + self._count]

    def halves(self, rows: int, columns: int) -> Tensor:
        return self.inside.view(torch.float16).view(rows, columns)

    def intact(self) -> Tensor:
        """Whether both bands still hold the poison, as a tensor: reading it waits."""
        before = self._storage[:OFFSET]
        after = self._storage[OFFSET + self._count : 2 * OFFSET + self._count]
        return ((before == SENTINEL).all() & (after == SENTINEL).all()).double()


def problem_of(weights: Weights, m: int, bias: bool) -> Problem:
    return problem(weights.quant_op, m, weights.n, weights.k, weights.group, bias)


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


_shared: list[Guarded] = []
"""The last one is large enough for every launch so far; graphs may still use the others."""


def shared_workspace(byte_count: int) -> int:
    """Memory for launches one after another, full of what the last one left; 0 for no bytes."""
    if byte_count == 0:
        return 0
    if not _shared or _shared[-1].capacity < byte_count:
        made = Guarded(2 * byte_count)
        made.arm(2 * byte_count)
        _shared.append(made)
    return _shared[-1].address


def launch(
    library: Library,
    tactic: int | str,
    weights: Weights,
    a: Tensor,
    c: int,
    *,
    bias: Tensor | None = None,
    workspace: int | None = None,
    workspace_bytes: int = 0,
    stream: int | None = None,
    flags: int = 0,
) -> None:
    """``c`` and ``workspace`` are addresses; the stream is torch's current one unless given.

    Without a workspace, launches one after another share one.
    """
    given = problem_of(weights, a.shape[0], bias is not None)
    if workspace is None:
        index = library.find_tactic(tactic) if isinstance(tactic, str) else tactic
        workspace_bytes = library.workspace_size(index, given)
        workspace = shared_workspace(workspace_bytes)
    args = Args(
        flags=flags,
        problem=ctypes.pointer(given),
        a=a.data_ptr(),
        b=weights.packed.data_ptr(),
        scales=weights.scales.data_ptr(),
        zeros=None if weights.zeros is None else weights.zeros.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        c=c,
        workspace=workspace or None,
        workspace_bytes=workspace_bytes,
    )
    library.run(tactic, args, current_stream() if stream is None else stream)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One tactic with a problem that it takes, ready to be launched again and again."""

    library: Library
    tactic: Tactic
    weights: Weights
    a: Tensor
    bias: Tensor | None

    @property
    def name(self) -> str:
        return f"{self.tactic.name} {self.weights.quant_op.label} M={self.m}"

    @property
    def m(self) -> int:
        return int(self.a.shape[0])

    @property
    def c_bytes(self) -> int:
        return self.m * self.weights.n * 2

    @property
    def problem(self) -> Problem:
        return problem_of(self.weights, self.m, self.bias is not None)

    @property
    def workspace_bytes(self) -> int:
        return self.library.workspace_size(self.tactic.index, self.problem)

    def start(
        self,
        c: Guarded,
        workspace: Guarded,
        *,
        a: Tensor | None = None,
        stream: int | None = None,
        flags: int = 0,
    ) -> None:
        """Launches into armed buffers; waits for nothing."""
        size = self.workspace_bytes
        launch(
            self.library,
            self.tactic.index,
            self.weights,
            self.a if a is None else a,
            c.address,
            bias=self.bias,
            workspace=workspace.address if size else 0,
            workspace_bytes=size,
            stream=stream,
            flags=flags,
        )

    def buffers(self) -> tuple[Guarded, Guarded]:
        """Its own output and workspace, armed."""
        c, workspace = Guarded(self.c_bytes), Guarded(self.workspace_bytes)
        c.arm(self.c_bytes)
        workspace.arm(self.workspace_bytes)
        return c, workspace

    def alone(self) -> Tensor:
        """The result of one launch with nothing beside it, copied."""
        c, workspace = self.buffers()
        self.start(c, workspace)
        result = c.inside.clone()
        torch.cuda.synchronize()
        return result


def plans(library: Library, n: int, k: int, group: int, m: int, name: str) -> list[Plan]:
    """Every tactic and quant op on one shape; the GEMV with fewer rows."""
    source = reference.generator(name)
    made: list[Plan] = []
    for op in QuantOp:
        weights = reference.random_weights(
            library, op, n, k, 0 if op is QuantOp.PER_COLUMN else group, source
        )
        a = reference.randn((m, k), source)
        bias = reference.randn((n,), source)
        for turn, tactic in enumerate(tactics_with(library, op)):
            rows = min(5, m) if tactic.is_gemv else m
            made.append(
                Plan(
                    library=library,
                    tactic=tactic,
                    weights=weights,
                    a=a[:rows],
                    bias=bias if turn % 2 else None,
                )
            )
    return made


def tactics_with(library: Library, op: QuantOp) -> Iterator[Tactic]:
    return (tactic for tactic in library.tactics if op in tactic.quant_ops)
