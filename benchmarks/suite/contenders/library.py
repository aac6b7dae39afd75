"""The tactics of this library, plain and with dependent launch, and what the package takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.suite.cases import Case, Job
from benchmarks.suite.contenders.base import Run
from benchmarks.suite.errors import Missing
from benchmarks.suite.gpu import Launch
from benchmarks.suite.results import Role
from benchmarks.suite.weights import Rows, Weights

#: Kinds of tactics that were extracted from TensorRT-LLM.
UPSTREAM = ("gemm", "gemv")
#: A decode tactic reads the weight once for each block of its tokens: more blocks than this lose …
MOST_BLOCKS = 4
#: … unless a block has so many of them, as the largest tiles have: no M is too large for those.
MANY_TOKENS = 128


class Library:
    """All tactics that can run; their runs come without a choice among them."""

    name = "library"

    def __init__(self, device: int, stream: int, *, everything: bool = False) -> None:
        from w4a16.library import LIBRARY

        self._library: Any = LIBRARY
        self._device = device
        self._stream = stream
        self.everything = everything

    def version(self) -> str:
        build = self._library.build
        return f"{build.version}, {build.release}, C API {build.api_version}"

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing is compiled late."""

    def prepare(self, weights: Weights) -> _Packed:
        return _Packed(self, weights)

    def problem(self, case: Case) -> Any:
        """As the package describes it."""
        from w4a16.library import Problem, QuantOp

        weight = case.weight
        op = QuantOp.GROUP_SCALE if weight.groups > 1 else QuantOp.PER_COLUMN
        if weight.zeros:
            op = QuantOp.GROUP_SCALE_ZERO
        group = 0 if op is QuantOp.PER_COLUMN else weight.k // weight.groups
        return Problem(quant_op=op, m=case.m, n=weight.n, k=weight.k, group_size=group)

    def auto(self, case: Case) -> tuple[str, str]:
        """The tactic that the package takes, and why."""
        from w4a16 import tactics

        choice = tactics.choose(self._device, self.problem(case))
        return self._library.tactics[choice.tactic].name, choice.source

    def candidates(self, case: Case) -> list[Any]:
        """Tactics that have a kernel for it, may be taken and may win."""
        problem = self.problem(case)
        able = [
            tactic
            for tactic in self._library.tactics
            if not self._library.why_unsupported(tactic.index, problem)
        ]
        if self.everything:
            return able
        from w4a16.tactics import accurate

        able = [tactic for tactic in able if accurate(tactic, problem)]
        return [tactic for tactic in able if not hopeless(tactic, case.m)] or able

    def runs(self, weights: Weights, rows: Rows) -> list[Run]:
        case = Case(weights.weight, rows.m)
        problem = self.problem(case)
        tactics = self.candidates(case)
        if not tactics:
            raise Missing("no tactic takes it")
        sizes = [self._library.workspace_size(tactic.index, problem) for tactic in tactics]
        torch = weights.torch
        workspace = torch.empty(max(*sizes, 16), dtype=torch.uint8, device="cuda")
        found = []
        for tactic, size in zip(tactics, sizes, strict=True):
            role: Role = "upstream" if tactic.kind in UPSTREAM else "ours"
            # The other kinds take the flag, and launch as without it.
            for overlap in (False, True) if tactic.kind == "decode" else (False,):
                launch = self._launch(
                    tactic.index, problem, weights, rows, workspace, size, overlap
                )
                found.append(
                    Run(
                        contender=tactic.name,
                        role=role,
                        launch=launch,
                        overlap=overlap,
                        kind=tactic.kind,
                        torch_graph=False,
                    )
                )
        return found

    def _launch(
        self,
        tactic: int,
        problem: Any,
        weights: Weights,
        rows: Rows,
        workspace: Any,
        size: int,
        overlap: bool,
    ) -> Launch:
        run, op = self._library.run, int(problem.quant_op)
        x, out, slots = rows.x, rows.out, rows.slots
        x_step, out_step = rows.m * problem.k * 2, rows.m * problem.n * 2
        x_first, out_first = int(x.data_ptr()), int(out.data_ptr())

        def launch(i: int) -> None:
            slot = i % slots
            run(
                tactic,
                op,
                rows.m,
                problem.n,
                problem.k,
                problem.group_size,
                x_first + slot * x_step,
                weights.address(i),
                weights.scales_address(i),
                weights.zeros_address(i),
                None,
                out_first + slot * out_step,
                workspace.data_ptr(),
                size,
                self._stream,
                overlap,
            )

        return launch


def hopeless(tactic: Any, m: int) -> bool:
    """Whether M is far from what a tactic is made for."""
    tokens = tactic.tile[1] if len(tactic.tile) > 1 else 0
    if tokens >= MANY_TOKENS:
        return False
    if tactic.kind == "decode" and tokens:
        return m > MOST_BLOCKS * tokens
    return tactic.kind == "gemm" and m >= 16 * max(tokens, 16)


class _Packed:
    def __init__(self, library: Library, weights: Weights) -> None:
        self._library = library
        self._weights = weights

    def runs(self, rows: Rows) -> list[Run]:
        return self._library.runs(self._weights, rows)
