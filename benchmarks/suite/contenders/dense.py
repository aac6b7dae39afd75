"""FP16 weights through torch: cuBLAS, called as a linear layer calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.suite.cases import Job
from benchmarks.suite.contenders.base import Run, load
from benchmarks.suite.weights import Rows, Weights


class Cublas:
    name = "cublas"

    def version(self) -> str:
        torch = load("torch")
        return f"torch {torch.__version__}, FP16 weights [N, K], torch.mm"

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing to compile."""

    def prepare(self, weights: Weights) -> _Dense:
        return _Dense(weights)


class _Dense:
    def __init__(self, weights: Weights) -> None:
        self._torch = weights.torch
        self._turns = weights.turns((weights.half(),))

    def runs(self, rows: Rows) -> list[Run]:
        torch: Any = self._torch
        turns = [weight.t() for (weight,) in self._turns]
        x, out = list(rows.x), list(rows.out)

        def launch(i: int) -> None:
            torch.mm(x[i % rows.slots], turns[i % len(turns)], out=out[i % rows.slots])

        return [Run(contender="cublas", role="peer", launch=launch)]
