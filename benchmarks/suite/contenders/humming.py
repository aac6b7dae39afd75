"""humming-kernels: compiled at run time, with the configuration that its own heuristics take."""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.suite.cases import Job, Weight
from benchmarks.suite.contenders.base import Run, load, nibbles, version_of
from benchmarks.suite.errors import Missing
from benchmarks.suite.weights import Rows, Weights


class Humming:
    name = "humming"

    def __init__(self) -> None:
        self._warming = threading.Lock()

    def version(self) -> str:
        load("humming.layer", "humming-kernels")
        for folder in load("humming").__path__:
            require_executable(Path(folder))
        return version_of("humming-kernels")

    def warm(self, jobs: Sequence[Job]) -> None:
        """Compiles the kernels of all jobs at once: a compiler takes seconds, and runs alone."""
        with self._warming:
            kernel = load("humming.kernel.humming").HummingKernel
            wanted: dict[tuple[str, str], None] = {}
            for weight in dict.fromkeys(job.case.weight for job in jobs):
                layer = _layer_config(weight)
                for m in {job.case.m for job in jobs if job.case.weight == weight}:
                    wanted[layer.to_str(), _tuning(layer, m)] = None
            # Two cores are left to the thread that measures.
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2)) as pool:
                done = [pool.submit(kernel.prepare_kernels, a, None, b) for a, b in wanted]
                for future in done:
                    future.exception()  # told again where it is used

    def prepare(self, weights: Weights) -> _Layer:
        with self._warming:  # what is being compiled is not compiled twice
            return _Layer(weights)


def require_executable(package: Path) -> None:
    """Raises :class:`Missing` if the compiler that comes with the package cannot be started."""
    for program in sorted(package.glob("_native/*/nvrtc_compile")):
        if not os.access(program, os.X_OK):
            raise Missing(
                f"{program} must be executable and is not, as after unpacking a wheel by hand:"
                f" chmod +x {shlex.quote(str(program))}, or pip install humming-kernels"
            )


def _schema(weight: Weight) -> dict[str, Any]:
    return {"dtype": "uint4", "group_size": weight.group, "has_zero_point": weight.zeros}


def _layer_config(weight: Weight) -> Any:
    torch = load("torch")
    schema = load("humming.schema").HummingWeightSchema
    return load("humming.transform").prepare_layer_config(
        shape_n=weight.n,
        shape_k=weight.k,
        weight_schema=schema(
            b_dtype="uint4", weight_scale_group_size=weight.group, has_zero_point=weight.zeros
        ),
        torch_dtype=torch.float16,
    )


def _tuning(layer: Any, m: int) -> str:
    """What a layer takes by itself for M rows: its table goes by 1, 2, 4 and multiples of 8."""
    stands_for = m if m in (1, 2, 4) else -(-m // 8) * 8
    found = load("humming.tune").get_heuristics_config(layer, shape_m=stands_for)
    return json.dumps(found, sort_keys=True)


class _Layer:
    def __init__(self, weights: Weights) -> None:
        torch, weight = weights.torch, weights.weight
        layer = (
            load("humming.layer")
            .HummingLayer(
                shape_n=weight.n,
                shape_k=weight.k,
                weight_config=_schema(weight),
                torch_dtype=torch.float16,
            )
            .cuda()
        )
        tensors = {
            "weight": nibbles(weights.q.t()).contiguous(),
            "weight_scale": weights.scales.t().contiguous(),
        }
        if weights.zero_points is not None:
            tensors["zero_point"] = nibbles(weights.zero_points).t().contiguous()
        layer.load_from_tensors(tensors)
        layer.transform()
        self._layer: Any = layer
        names = ("weight", "weight_scale", "zero_point", "weight_scale_2")
        self._names = [name for name in names if getattr(layer, name, None) is not None]
        self._turns = weights.turns(tuple(getattr(layer, name).data for name in self._names))

    def runs(self, rows: Rows) -> list[Run]:
        forward = load("humming.forward").humming_forward
        layer = self._layer
        config, locks = layer.humming_config, layer.locks
        tuning = _tuning(config, rows.m)
        operands = [dict(zip(self._names, tensors, strict=True)) for tensors in self._turns]
        x, out = list(rows.x), list(rows.out)

        def launch(i: int) -> None:
            slot = i % rows.slots
            forward(
                config,
                inputs=x[slot],
                outputs=out[slot],
                locks=locks,
                tuning_config=tuning,
                **operands[i % len(operands)],
            )

        return [Run(contender="humming", role="peer", launch=launch)]
