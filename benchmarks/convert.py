"""Time and memory of ``w4a16 convert`` on a random GPTQ checkpoint.

Usage: ``python -m benchmarks.convert FOLDER --gigabytes 8 [--act-order] [--device cpu]``

The checkpoint (layers of Llama 3.1 8B's shapes, group 128, asymmetric, an embedding in BF16) is
made in FOLDER and removed in the end. A folder in memory (``/dev/shm``) shows the time apart from
the disk's.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from w4a16.safetensors import write

GROUP = 128
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
EMBEDDING = (128256, 4096)
_BLOCK = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)


def _bytes(count: int) -> Iterator[Any]:
    for start in range(0, count, len(_BLOCK)):
        yield _BLOCK[: min(len(_BLOCK), count - start)]


def _layer(name: str, k: int, n: int, act_order: bool) -> dict[str, Any]:
    rng = np.random.default_rng(k + n)
    groups = k // GROUP
    order = np.arange(k, dtype=np.int32) // GROUP
    if act_order:
        rng.shuffle(order)
    scales = rng.uniform(1e-3, 1e-2, (groups, n)).astype(np.float16)
    return {
        f"{name}.qweight": ("I32", (k // 8, n), _bytes(k * n // 2)),
        f"{name}.qzeros": ("I32", (groups, n // 8), _bytes(groups * n // 2)),
        f"{name}.scales": ("F16", (groups, n), scales),
        f"{name}.g_idx": ("I32", (k,), order),
    }


def make(folder: Path, gigabytes: float, shard_gigabytes: float, act_order: bool) -> int:
    """Writes the checkpoint; its bytes."""
    folder.mkdir(parents=True)
    rows, columns = EMBEDDING
    shards: list[dict[str, Any]] = [
        {"model.embed_tokens.weight": ("BF16", EMBEDDING, _bytes(rows * columns * 2))}
    ]
    total = in_shard = rows * columns * 2
    block = 0
    while total < gigabytes * 1e9:
        for name, (k, n) in SHAPES.items():
            if in_shard > shard_gigabytes * 1e9:
                shards.append({})
                in_shard = 0
            shards[-1] |= _layer(f"model.layers.{block}.{name}", k, n, act_order)
            in_shard += k * n // 2
            total += k * n // 2
        block += 1
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(tensors, file)
        size += write(folder / file, tensors, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": act_order,
        "sym": False,
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return size


def _memory(process: int) -> dict[str, int]:
    """Bytes in memory now: its own, and of mapped files."""
    found = {"RssAnon": 0, "RssFile": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found


def measure(command: list[str]) -> tuple[float, float, dict[str, int]]:
    """Seconds, seconds of all cores together, and the most that was in memory."""
    begin = time.monotonic()
    process = subprocess.Popen(command)
    peak = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        now = _memory(process.pid)
        peak = {name: max(peak[name], now[name]) for name in peak}
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the conversion ended with status {process.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begin, used.ru_utime + used.ru_stime, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    work = given.folder / "w4a16-benchmark-convert"
    source, target = work / "model", work / "out"
    try:
        size = make(source, given.gigabytes, given.shard_gigabytes, given.act_order)
        program = (
            "import sys; from w4a16.convert import convert;"
            "convert(sys.argv[1], sys.argv[2], device=sys.argv[3], threads=int(sys.argv[4]))"
        )
        command = [sys.executable, "-c", program, str(source), str(target)]
        seconds, cores, peak = measure([*command, given.device, str(given.threads)])
        written = sum(path.stat().st_size for path in target.iterdir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"checkpoint       {size / 1e9:.2f} GB, act-order {given.act_order}")
    print(f"written          {written / 1e9:.2f} GB")
    print(f"time             {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")
    print(f"cores            {cores:.1f} s together")
    print(f"own memory       {peak['RssAnon'] / 1e9:.2f} GB at most")
    print(f"mapped files     {peak['RssFile'] / 1e9:.2f} GB at most")


if __name__ == "__main__":
    main()
