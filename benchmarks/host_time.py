"""Host time of a launch: the first one of each kernel in a process, and those after it.

python -m benchmarks.host_time [LIBRARY]      (needs a GPU and libcudart; no torch)

Prints, for each tactic, microseconds of the first call (loading and decompressing its code
included, until the kernel has finished) and the median of later calls (until the call returns).
Two libraries that differ in --compress-mode show what compression costs.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from tests.gpu.cuda import Cuda
from tests.gpu.library import Library, find_library
from tests.gpu.sanitize import Buffers, launches

_CALLS = 200


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else find_library()
    library, cuda = Library(path), Cuda()
    cuda.synchronize()  # the context is not what is measured
    seen: set[tuple[str, str]] = set()
    firsts: list[float] = []
    laters: list[tuple[float, str]] = []
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
        laters.append((later, launch.tactic.name))
        print(f"{key[0]:<26} {key[1]:<17} first {first:9.0f} us   later {later:6.1f} us")
        buffers.free()
    compress = library.build()["compress"]
    print(
        f"{path.stat().st_size:,} bytes, compress {compress}: first launch median "
        f"{statistics.median(firsts):.0f} us, first of all {firsts[0]:.0f} us, sum "
        f"{sum(firsts) / 1000:.0f} ms of {len(firsts)}; later launches GEMM "
        f"{statistics.median(t for t, n in laters if n != 'gemv'):.1f} us, GEMV "
        f"{statistics.median([t for t, n in laters if n == 'gemv'] or [0.0]):.1f} us"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
