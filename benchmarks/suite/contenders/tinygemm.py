"""``torch.ops.aten._weight_int4pack_mm`` ("tinygemm"), with weights packed by its own operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.suite.cases import Job
from benchmarks.suite.contenders.base import LIMIT, LIMIT_BF16, Run, brief, load
from benchmarks.suite.errors import Missing
from benchmarks.suite.weights import Rows, Weights

GROUPS = (32, 64, 128, 256)
_INNER_K_TILES = 8


class TinyGemm:
    name = "tinygemm"

    def __init__(self) -> None:
        self._dtype: Any = None

    def version(self) -> str:
        torch = load("torch")
        return f"torch {torch.__version__}, _weight_int4pack_mm, inner K tiles {_INNER_K_TILES}"

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing to compile."""

    def prepare(self, weights: Weights) -> _Tiled:
        if weights.weight.group not in GROUPS:
            raise Missing(f"takes groups of {', '.join(map(str, GROUPS))}, not per column")
        if self._dtype is None:
            self._dtype = _dtype(weights.torch)
        return _Tiled(weights, self._dtype)


def _dtype(torch: Any) -> Any:
    """FP16 if this torch takes it, which not all do, otherwise BF16."""
    q = torch.zeros((64, 64), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(q, _INNER_K_TILES)
    try:
        x = torch.ones((1, 128), dtype=torch.float16, device="cuda")
        table = torch.ones((1, 64, 2), dtype=torch.float16, device="cuda")
        torch.ops.aten._weight_int4pack_mm(x, packed, 128, table)
    except Exception:  # whatever it says, it does not take FP16
        return torch.bfloat16
    return torch.float16


class _Tiled:
    def __init__(self, weights: Weights, dtype: Any) -> None:
        torch = weights.torch
        self._torch = torch
        self._dtype = dtype
        self._group = weights.weight.group
        q = weights.q.t()
        pairs = ((q[:, 0::2] << 4) | q[:, 1::2]).contiguous()
        try:
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
        except RuntimeError as error:
            raise Missing(f"its packing refuses it: {brief(error)}") from None
        zeros = torch.zeros_like(weights.scales)
        if weights.zero_points is not None:
            zeros = (8 - weights.zero_points.half()) * weights.scales
        # w = (q - 8) * scale + zero; both are numbers of BF16 too.
        table = torch.stack([weights.scales, zeros], -1).to(dtype).contiguous()
        self._turns = weights.turns((packed, table))

    def runs(self, rows: Rows) -> list[Run]:
        multiply = self._torch.ops.aten._weight_int4pack_mm
        x = [slot.to(self._dtype) for slot in rows.x]
        turns, group = self._turns, self._group

        def launch(i: int) -> Any:
            packed, table = turns[i % len(turns)]
            return multiply(x[i % rows.slots], packed, group, table)

        half = self._dtype == self._torch.float16
        return [
            Run(
                contender="tinygemm",
                role="peer",
                launch=launch,
                limit=LIMIT if half else LIMIT_BF16,
                note="" if half else "BF16 activations and outputs: this torch takes no FP16",
            )
        ]
