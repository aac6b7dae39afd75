"""What no kernel can beat: reading the weight once, and multiplying at the matmul's rate.

Both are measured in the run that they are compared with. The read kernel is ``read.cu``, compiled
with nvcc when it is first needed and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.suite.errors import Missing
from benchmarks.suite.gpu import Gpu, Launch, Replay
from benchmarks.suite.results import Mode, Read, Times
from benchmarks.suite.weights import Weights

SOURCE = Path(__file__).with_name("read.cu")
BLOCKS_PER_SM = (2, 4, 6, 8, 12, 16)
IN_FLIGHT = (1, 2, 4, 8)
#: (M, N, K) of the FP16 matmul whose rate counts.
MATMUL = (8192, 8192, 8192)
_MATMUL_LAUNCHES = 4
_TARGET = "-gencode=arch=compute_90,code=sm_90"


class Native:
    """The compiled ``read.cu``."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._read = library.bench_read
        self._read.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer]
        self._nothing = library.bench_nothing
        self._nothing.argtypes = [pointer]

    def read(
        self, address: int, size: int, blocks: int, in_flight: int, sink: int, stream: int
    ) -> None:
        _check(self._read(address, size, blocks, in_flight, sink, stream), "the read kernel")

    def nothing(self, stream: int) -> None:
        _check(self._nothing(stream), "the empty kernel")


def _check(status: int, what: str) -> None:
    if status != 0:
        raise Missing(f"{what} did not start: CUDA error {status}")


def build(nvcc: str = "", folder: Path | None = None) -> Path:
    """The compiled library; raises :class:`Missing`."""
    compiler = nvcc or shutil.which("nvcc") or _usual_nvcc()
    if not compiler:
        raise Missing("no nvcc: put it on PATH, or name it with --nvcc, to measure the floor")
    folder = folder or cache_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    target = folder / f"read-{key}.so"
    if target.is_file():
        return target
    options = ("-std=c++17", "-O3", _TARGET, "-shared", "-Xcompiler=-fPIC", "-cudart=static")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary, "read.so")
            command = [compiler, *options, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise Missing(f"nvcc failed on {SOURCE.name}: {done.stderr.strip()[-500:]}")
            made.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{SOURCE.name} was not compiled: {error}") from None
    return target


def cache_folder() -> Path:
    """Where what is compiled is kept."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "w4a16-bench"


def _usual_nvcc() -> str:
    path = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin", "nvcc")
    return str(path) if path.is_file() else ""


def settings(sm_count: int) -> list[tuple[int, int]]:
    """(blocks, loads in flight) of the read kernels that compete."""
    return [(blocks * sm_count, loads) for blocks in BLOCKS_PER_SM for loads in IN_FLIGHT]


def measure_read(gpu: Gpu, native: Native, weights: Weights, rounds: int, warm: int) -> Read:
    """The fastest of the settings on a weight, by its median."""
    sink = gpu.torch.zeros(4, dtype=gpu.torch.int32, device="cuda")

    def launcher(blocks: int, in_flight: int) -> Launch:
        def launch(i: int) -> None:
            address = weights.address(i)
            native.read(address, weights.size, blocks, in_flight, sink.data_ptr(), gpu.handle)

        return launch

    replays: list[Replay] = []
    try:
        for setting in settings(gpu.sm_count):
            launch = launcher(*setting)
            launch(0)
            replays.append(gpu.capture(launch, weights.launches(1)))
        times = gpu.rounds(replays, rounds, warm)
    finally:
        for replay in replays:
            replay.close()
    best = min(range(len(times)), key=lambda i: times[i].median)
    blocks, in_flight = settings(gpu.sm_count)[best]
    return Read(
        weight=weights.weight,
        bytes=weights.size,
        setting=f"{blocks} blocks of 256 threads, {in_flight} loads in flight",
        times=times[best],
    )


def measure_empty(gpu: Gpu, native: Native, rounds: int, warm: int) -> Times:
    """An empty kernel in a graph of 40."""

    def launch(i: int) -> None:
        native.nothing(gpu.handle)

    launch(0)
    replay = gpu.capture(launch, 40)
    try:
        return gpu.rounds([replay], rounds, warm)[0]
    finally:
        replay.close()


def measure_matmul(
    gpu: Gpu, rounds: int, warm: int, pause: float, sustain: float
) -> dict[Mode, Times]:
    """The large FP16 matmul through torch (cuBLAS), on random data."""
    torch: Any = gpu.torch
    m, n, k = MATMUL
    a = torch.randn(m, k, device="cuda", dtype=torch.float16)
    b = torch.randn(n, k, device="cuda", dtype=torch.float16)
    c = torch.empty(m, n, device="cuda", dtype=torch.float16)

    def launch(i: int) -> None:
        torch.mm(a, b.t(), out=c)

    launch(0)
    replay = gpu.capture(launch, _MATMUL_LAUNCHES, torch_graph=True)
    try:
        found: dict[Mode, Times] = {}
        found["burst"] = gpu.rounds([replay], rounds, warm, pause)[0]
        gpu.busy([replay], sustain)
        found["sustained"] = gpu.rounds([replay], rounds, 0)[0]
        return found
    finally:
        replay.close()
