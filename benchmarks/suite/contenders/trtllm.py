"""TensorRT-LLM's own operator, where the whole of it is installed, with its autotuner on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from benchmarks.suite.cases import Job
from benchmarks.suite.contenders.base import Run, load, version_of
from benchmarks.suite.errors import Missing
from benchmarks.suite.weights import Rows, Weights

GROUPS = (64, 128)


class TensorRtLlm:
    name = "tensorrt_llm"

    def version(self) -> str:
        load("tensorrt_llm")
        load("tensorrt_llm._torch.custom_ops.torch_custom_ops", "tensorrt_llm")
        return version_of("tensorrt_llm")

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing is compiled late."""

    def prepare(self, weights: Weights) -> _Operator:
        if weights.weight.group not in GROUPS:
            raise Missing(f"takes groups of {' and '.join(map(str, GROUPS))}")
        return _Operator(weights)


class _Operator:
    def __init__(self, weights: Weights) -> None:
        torch = weights.torch
        self._torch = torch
        self._group = weights.weight.group
        signed = weights.q ^ 8  # two's complement of q - 8
        pairs = (signed[:, 0::2] | (signed[:, 1::2] << 4)).view(torch.int8).contiguous()
        preprocess = load("tensorrt_llm.quantization.functional").preprocess_weights_for_mixed_gemm
        packed = preprocess(pairs.cpu(), torch.quint4x2, torch.float16).cuda().contiguous()
        self._has_zeros = weights.zero_points is not None
        tensors = [packed, weights.scales]
        if weights.zero_points is not None:
            tensors.append((8 - weights.zero_points.half()) * weights.scales)
        self._turns = weights.turns(tuple(tensors))

    def runs(self, rows: Rows) -> list[Run]:
        torch: Any = self._torch
        multiply = torch.ops.trtllm.finegrained_mixed_dtype_gemm
        turns, group, has_zeros = self._turns, self._group, self._has_zeros
        x = list(rows.x)

        def launch(i: int) -> Any:
            packed, scales, *zeros = turns[i % len(turns)]
            return multiply(
                input=x[i % rows.slots],
                weight=packed,
                scales=scales,
                group_size=group,
                has_zero_point=has_zeros,
                output_dtype=torch.float16,
                zeros=zeros[0] if zeros else None,
            )

        note = ""
        try:
            tuned: Any = load("tensorrt_llm._torch.autotuner", "tensorrt_llm").autotune()
        except Missing as error:
            tuned, note = contextlib.nullcontext(), f"without its autotuner: {error}"
        with tuned:
            launch(0)
        return [Run(contender="tensorrt_llm", role="peer", launch=launch, note=note)]
