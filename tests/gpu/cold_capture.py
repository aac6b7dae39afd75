"""Captures the first launch of every kernel in a fresh process into a CUDA graph; see test_launch.

Whatever a first launch has to set up (loading code, raising a kernel's shared memory limit) then
happens during the capture, where CUDA forbids allocations and synchronisation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from .cuda import Cuda, CudaError
from .library import ApiError, Library, LibraryNotFoundError, find_library
from .sanitize import EXIT_CANNOT_RUN, EXIT_WRONG, NAN, Buffers, Launch, helpers, launches


def main() -> int:
    try:
        library = Library(find_library())
        library.check_device()
        cuda = Cuda()
    except (LibraryNotFoundError, ApiError, OSError, CudaError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return EXIT_CANNOT_RUN
    stream = cuda.new_stream()
    wrong: list[str] = []
    count = 0
    first: Launch | None = None
    for launch in launches(library, cuda, "", 1):
        first = first or launch
        count += 1
        buffers = Buffers(cuda, library, launch)
        graph = capture(library, cuda, launch, buffers, stream)
        untouched = buffers.result()
        cuda.launch_graph(graph, stream)
        replayed = buffers.result()
        buffers.poison()
        library.run(launch.tactic.index, buffers.args)
        cuda.synchronize()
        if NAN * (len(untouched) // 2) != untouched:
            wrong.append(f"{launch}: ran while it was captured")
        if replayed != buffers.result():
            wrong.append(f"{launch}: the replay differs from a plain launch")
        buffers.free()
    for helper in helpers(library, cuda, 1):
        count += 1
        graph = capture_any(cuda, helper.name, helper.start, stream)
        if not helper.untouched():
            wrong.append(f"{helper.name}: ran while it was captured")
        cuda.launch_graph(graph, stream)
        if helper.result() != helper.wanted:
            wrong.append(f"{helper.name}: the replay is wrong")
        helper.free()
    if first is not None:
        buffers = Buffers(cuda, library, first)
        buffers.args.problem.contents.m = 0
        graph = capture(library, cuda, first, buffers, stream)
        if cuda.node_count(graph):
            wrong.append(f"{first.tactic.name} with M = 0 launched something")
    print("\n".join([*wrong, f"{count} launches captured, {len(wrong)} wrong"]))
    return EXIT_WRONG if wrong or not count else 0


def capture(library: Library, cuda: Cuda, launch: Launch, buffers: Buffers, stream: int) -> int:
    return capture_any(
        cuda, str(launch), partial(library.run, launch.tactic.index, buffers.args), stream
    )


def capture_any(cuda: Cuda, name: str, start: Callable[[int], None], stream: int) -> int:
    cuda.begin_capture(stream)
    try:
        start(stream)
    except ApiError as error:
        raise SystemExit(f"{name}: {error}") from error
    return cuda.end_capture(stream)


if __name__ == "__main__":
    sys.exit(main())
