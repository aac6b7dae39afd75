"""GemLite: Triton kernels, with its own tuning on, which takes minutes for shapes it has no table
of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.suite.cases import Job
from benchmarks.suite.contenders.base import Run, load, version_of
from benchmarks.suite.weights import Rows, Weights


class GemLite:
    name = "gemlite"

    def version(self) -> str:
        load("gemlite")
        return version_of("gemlite")

    def warm(self, jobs: Sequence[Job]) -> None:
        """It tunes at the first call, on the GPU."""

    def prepare(self, weights: Weights) -> _Linear:
        return _Linear(weights)


class _Linear:
    def __init__(self, weights: Weights) -> None:
        gemlite: Any = load("gemlite")
        weight = weights.weight
        linear = gemlite.GemLiteLinear(
            4,
            group_size=weight.group or weight.k,
            in_features=weight.k,
            out_features=weight.n,
            input_dtype=gemlite.DType.FP16,
            output_dtype=gemlite.DType.FP16,
        )
        zeros: Any = 8
        if weights.zero_points is not None:
            zeros = weights.zero_points.t().contiguous().half()
        # Per column its formula is (q - zero) * scale; with groups q * scale + zero'.
        linear.pack(
            weights.q.t().contiguous(),
            weights.scales.t().contiguous(),
            zeros,
            fma_mode=bool(weight.group),
        )
        self._forward: Any = gemlite.forward_functional
        self._meta = linear.get_meta_args()
        tensors = tuple(getattr(t, "data", t) for t in linear.get_tensor_args())
        self._turns = weights.turns(tensors)

    def runs(self, rows: Rows) -> list[Run]:
        forward, meta = self._forward, self._meta
        turns = [list(tensors) for tensors in self._turns]
        x = list(rows.x)

        def launch(i: int) -> Any:
            return forward(x[i % rows.slots], None, turns[i % len(turns)], meta)

        return [Run(contender="gemlite", role="peer", launch=launch)]
