"""Host time of a launch.

python -m benchmarks.host_time [LIBRARY]            (needs a GPU and libcudart; no torch)
python -m benchmarks.host_time --torch [LIBRARY]    (needs a GPU and torch)

The first prints, for each tactic, microseconds of the first call (loading and decompressing its
code included, until the kernel has finished) and the median of later calls (until the call
returns). Two libraries that differ in --compress-mode show what compression costs.

The second prints what a call costs *above* the launch of an empty kernel
(``torch.cuda._sleep(0)``): the C function (through ctypes, which is part of the figure),
``LIBRARY.run``, ``torch.ops.w4a16.linear``, the module and ``w4a16.linear``; then what one call
adds to the replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import environment
from benchmarks.suite.errors import BenchError
from tests.gpu.cuda import Cuda, CudaError
from tests.gpu.library import Library, LibraryNotFoundError, find_library
from tests.gpu.sanitize import Buffers, launches

_CALLS = 200
_ROUNDS = 25
_N, _K, _GROUP = 1024, 1024, 128
_IN_GRAPH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path, nargs="?", default=None)
    parser.add_argument("--torch", action="store_true", help="calls through the Python package")
    options = parser.parse_args(arguments)
    try:
        path = options.library or find_library()
        return _with_torch(path) if options.torch else _with_ctypes(path)
    except (BenchError, CudaError, LibraryNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _with_ctypes(path: Path) -> int:
    library, cuda = Library(path), Cuda()
    cuda.synchronize()  # the context is not what is measured
    seen: set[tuple[str, str]] = set()
    firsts: list[float] = []
    laters: dict[str, list[float]] = {}
    for launch in launches(library, cuda, "", 1):
        key = (launch.tactic.name, launch.operands.quant_op.label)
        if key in seen:
            continue
        seen.add(key)
        buffers = Buffers(cuda, library, launch)
        begin = time.perf_counter_ns()
        library.run(launch.tactic.index, buffers.args)
        cuda.synchronize()
        first = (time.perf_counter_ns() - begin) / 1000
        times = []
        for _ in range(_CALLS):
            begin = time.perf_counter_ns()
            library.run(launch.tactic.index, buffers.args)
            times.append((time.perf_counter_ns() - begin) / 1000)
            cuda.synchronize()
        later = statistics.median(times)
        firsts.append(first)
        laters.setdefault(launch.tactic.kind, []).append(later)
        print(f"{key[0]:<26} {key[1]:<17} first {first:9.0f} us   later {later:6.1f} us")
        buffers.free()
    compress = library.build()["compress"]
    kinds = ", ".join(f"{kind} {statistics.median(us):.1f} us" for kind, us in laters.items())
    print(
        f"{path.stat().st_size:,} bytes, compress {compress}: first launch median "
        f"{statistics.median(firsts):.0f} us, first of all {firsts[0]:.0f} us, sum "
        f"{sum(firsts) / 1000:.0f} ms of {len(firsts)}; later launches, medians: "
        f"{kinds}"
    )
    return 0


def _with_torch(path: Path) -> int:
    os.environ["W4A16_LIBRARY"] = str(path)
    environment.find_library()
    torch = environment.load_torch()
    from w4a16.library import LIBRARY, Problem, QuantOp

    def empty() -> None:
        torch.cuda._sleep(0)

    launch = _per_call(torch, empty)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {path}")
    print(f"N = {_N}, K = {_K}, groups of {_GROUP}; microseconds of host time")
    print(f"an empty kernel: {launch:.2f}; below, what is above it")
    with torch.no_grad():
        gemv = LIBRARY.tactic_index.get("gemv")
        gemm = next(tactic.index for tactic in LIBRARY.tactics if tactic.kind == "gemm")
        few_rows = Problem(
            quant_op=QuantOp.GROUP_SCALE_ZERO, m=8, n=_N, k=_K, group_size=_GROUP, has_bias=True
        )
        decode = LIBRARY.auto_tactic(few_rows)  # a GEMM tactic in a library without any
        for tactic, m in ((gemv, 1), (decode, 8), (gemm, 64)):
            if tactic is None:
                continue
            for act_order in (False, True):
                calls = _calls(torch, tactic, m, act_order)
                order = "act-order" if act_order else "in order"
                print(f"{LIBRARY.tactics[tactic].name}, M = {m}, {order}:")
                for name, call in calls.items():
                    print(f"  {name:<44} {_per_call(torch, call) - launch:6.2f}")
                one = _per_replay(torch, calls["torch.ops.w4a16.linear"])
                nothing = _per_replay(torch, empty)
                print(f"  {'in a CUDA graph, above an empty node':<44} {one - nothing:6.2f}")
    return 0


def _calls(torch: Any, tactic: int, m: int, act_order: bool) -> dict[str, Callable[[], object]]:
    """The same product at each level; with act-order C calls are two."""
    import w4a16
    from w4a16.library import LIBRARY, Problem, QuantOp

    device = torch.device("cuda")
    random = torch.Generator(device=device).manual_seed(1)

    def half(*shape: int) -> Any:
        return torch.randn(shape, device=device, generator=random).mul(0.01).half()

    bytes_ = torch.randint(256, (_N, _K // 2), device=device, generator=random, dtype=torch.uint8)
    columns = torch.randperm(_K, device=device, generator=random, dtype=torch.int32)
    packed: Any = w4a16.PackedWeight(
        packed=bytes_,
        scales=half(_K // _GROUP, _N),
        zeros=half(_K // _GROUP, _N),
        columns=columns if act_order else None,
        bias=half(_N),
        in_features=_K,
        out_features=_N,
    )
    module = w4a16.W4A16Linear.from_packed(packed)
    x, out, gathered = half(m, _K), half(m, _N), half(m, _K)
    batch = x[None]
    op = torch.ops.w4a16.linear.default
    weight = (packed.packed, packed.scales, packed.zeros, packed.columns, packed.bias, _K, _N)
    stream = torch.cuda.current_stream().cuda_stream
    quant_op = QuantOp.GROUP_SCALE_ZERO
    problem = Problem(quant_op=quant_op, m=m, n=_N, k=_K, group_size=_GROUP, has_bias=True)
    size = LIBRARY.workspace_size(tactic, problem)
    workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=device)
    a = gathered if act_order else x

    def gather() -> None:
        if act_order:
            LIBRARY.gather_columns(
                x.data_ptr(), m, _K, _K, columns.data_ptr(), _K, gathered.data_ptr(), stream
            )

    def run() -> None:
        gather()
        LIBRARY.run(
            tactic,
            int(quant_op),
            m,
            _N,
            _K,
            _GROUP,
            a.data_ptr(),
            packed.packed.data_ptr(),
            packed.scales.data_ptr(),
            packed.zeros.data_ptr(),
            packed.bias.data_ptr(),
            out.data_ptr(),
            workspace.data_ptr(),
            size,
            stream,
        )

    run()  # leaves its arguments in the frame of this thread
    function, arguments = LIBRARY._run, LIBRARY._frame.args

    def plain() -> object:
        return op(x, *weight[:5])

    with torch.inference_mode():
        inferred = x.clone()  # such tensors skip autograd's turn of the dispatcher
    calls: dict[str, Callable[[], object]] = {}
    if not act_order:
        calls["w4a16_run"] = lambda: function(tactic, arguments, stream)
        calls["torch.ops.w4a16.linear(x, packed, scales)"] = lambda: op(x, *weight[:2])
    calls |= {
        "LIBRARY.run": run,
        "torch.ops.w4a16.linear": plain,
        "torch.ops.w4a16.linear, x [1, M, K]": lambda: op(batch, *weight[:5]),
        "torch.ops.w4a16.linear, of inference tensors": lambda: op(inferred, *weight[:5]),
        "torch.ops.w4a16.linear, sizes and tactic named": lambda: op(x, *weight, tactic),
        "W4A16Linear, the tactic of the tables": lambda: module(x),
        "w4a16.linear": lambda: w4a16.linear(x, packed, tactic=tactic),
    }
    return calls


def _per_call(torch: Any, call: Callable[[], object]) -> float:
    """Microseconds until a call returns, while the queue of launches is not full."""
    for _ in range(10):
        call()
    times = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter_ns() - begin) / 1000 / _CALLS)
    torch.cuda.synchronize()
    return statistics.median(times)


def _per_replay(torch: Any, call: Callable[[], object]) -> float:
    """Microseconds that a call adds to the replay of a graph, on the host."""

    def replay(count: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        times = []
        for _ in range(_ROUNDS):
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            graph.replay()
            times.append((time.perf_counter_ns() - begin) / 1000)
        torch.cuda.synchronize()
        return statistics.median(times)

    return (replay(_IN_GRAPH) - replay(1)) / (_IN_GRAPH - 1)


if __name__ == "__main__":
    sys.exit(main())
