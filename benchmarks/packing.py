"""How fast weights are packed: ``python -m benchmarks.packing [--gpu] [-k K] [-n N]``.

Rates are bytes of packed weight (K * N / 2) a second, of the fastest of several calls: of the
library's function alone, and of ``w4a16.pack`` with all its checks, scales and zero points.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import w4a16
from w4a16.library import LIBRARY, Source

GROUP = 128


@dataclass(frozen=True)
class Weight:
    """A random weight in one format."""

    name: str
    source: Source
    tensors: dict[str, Any]
    """By the format's names, or for plain the arguments of ``pack``."""
    q: str
    rows: Any | None

    def pack(self, tensors: dict[str, Any], **options: Any) -> w4a16.PackedWeight:
        if self.source is Source.BYTES:
            return w4a16.pack(**tensors, group_size=GROUP, **options)
        format = self.name.split()[0]
        return w4a16.pack(tensors, format=format, group_size=GROUP, **options)


def weights(k: int, n: int) -> Iterator[Weight]:
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, k * n // 8, dtype=np.int32)
    scales = np.exp2(rng.uniform(-9, -7, (k // GROUP, n))).astype(np.float16)
    by_output = np.ascontiguousarray(scales.T)
    points = rng.integers(-(2**31), 2**31, (k // GROUP, n // 8), dtype=np.int32)
    g_idx = rng.permutation(np.arange(k, dtype=np.int32) // GROUP)
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    gptq = {"qweight": words.reshape(k // 8, n), "qzeros": points, "scales": scales}
    yield Weight("gptq", Source.GPTQ, gptq, "qweight", None)
    yield Weight("gptq act-order", Source.GPTQ, {**gptq, "g_idx": g_idx}, "qweight", order)
    awq = {**gptq, "qweight": words.reshape(k, n // 8)}
    yield Weight("awq", Source.AWQ, awq, "qweight", None)
    packed = {"weight_packed": words.reshape(n, k // 8), "weight_scale": by_output}
    name = "compressed-tensors"
    yield Weight(name, Source.COMPRESSED_TENSORS, packed, "weight_packed", None)
    packed = {**packed, "weight_g_idx": g_idx}
    yield Weight(f"{name} act-order", Source.COMPRESSED_TENSORS, packed, "weight_packed", order)
    nibbles = words.view(np.uint8)
    q = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(k, n)
    plain = {"q": q, "scales": scales}
    yield Weight("plain", Source.BYTES, plain, "q", None)
    yield Weight("plain act-order", Source.BYTES, {**plain, "g_idx": g_idx}, "q", order)


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call; the first one is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def on_cpu(k: int, n: int, threads: int) -> Iterator[tuple[str, float, float]]:
    """Name, seconds of the library's function, seconds of ``pack``."""
    out = np.empty((n, k // 2), np.uint8)
    for weight in weights(k, n):
        q = weight.tensors[weight.q]
        rows = None if weight.rows is None else weight.rows.ctypes.data
        alone = best(
            lambda w=weight, s=q, r=rows: LIBRARY.pack(  # type: ignore[misc]
                w.source, s.ctypes.data, k, n, out.ctypes.data, rows=r, threads=threads
            ),
            5,
        )
        whole = best(lambda w=weight: w.pack(w.tensors, threads=threads), 5)  # type: ignore[misc]
        yield weight.name, alone, whole


def on_gpu(k: int, n: int) -> Iterator[tuple[str, float, float]]:
    import torch

    out = torch.empty((n, k // 2), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for weight in weights(k, n):
        tensors = {name: torch.from_numpy(array).cuda() for name, array in weight.tensors.items()}
        q = tensors[weight.q]
        rows = None if weight.rows is None else torch.from_numpy(weight.rows).cuda()

        def launch(w: Weight = weight, s: Any = q, r: Any = rows) -> None:
            address = None if r is None else r.data_ptr()
            LIBRARY.pack_device(
                w.source, s.data_ptr(), k, n, out.data_ptr(), stream=stream, rows=address
            )

        def whole(w: Weight = weight, t: dict[str, Any] = tensors) -> None:
            w.pack(t)
            torch.cuda.synchronize()

        launch()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(20):
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        yield weight.name, min(times), best(whole, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-k", type=int, default=8192, help="inputs, a multiple of 128")
    parser.add_argument("-n", type=int, default=28672, help="outputs, a multiple of 8")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, with torch")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: all cores")
    arguments = parser.parse_args()
    k, n = arguments.k, arguments.n
    place = "GPU" if arguments.gpu else f"{arguments.threads or os.cpu_count()} threads"
    print(f"K = {k}, N = {n}, group {GROUP}, {k * n / 2e6:.1f} MB packed, {place}")
    print(f"{'':28}{'library':>22}{'w4a16.pack':>22}")
    rows = on_gpu(k, n) if arguments.gpu else on_cpu(k, n, arguments.threads)
    for name, alone, whole in rows:
        cells = (f"{t * 1e3:9.2f} ms {k * n / 2e9 / t:7.2f} GB/s" for t in (alone, whole))
        print(f"{name:28}" + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
