"""Graphs of launches on one GPU, and the time they take: in turns, after a pause or a long run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from benchmarks.suite.errors import Missing
from benchmarks.suite.results import Times

Launch: TypeAlias = Callable[[int], Any]
"""Puts launch i on the stream. Returns its output if it is not one of the slots given to it."""

GRAPH = "graph"
#: Replays that run ahead of a round after a pause.
_AHEAD = 3
EAGER = "calls one by one between two events, without a graph"


class Replay(Protocol):
    """Several launches that can be put on the stream again and again."""

    launches: int
    method: str
    outputs: Sequence[Any]
    """What the launches returned, in their order."""

    def launch(self) -> None: ...
    def close(self) -> None: ...


class Gpu:
    """The current device, through torch and the driver. Use as a context manager: all work of the
    block, torch's too, goes to one stream of its own."""

    def __init__(self, torch: Any) -> None:
        if not torch.cuda.is_available():
            raise Missing("torch sees no CUDA device: run this on a machine with a Hopper GPU")
        self.torch = torch
        self.device = int(torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = str(properties.name)
        self.sm_count = int(properties.multi_processor_count)
        self.memory = int(properties.total_memory)
        self.uuid = str(getattr(properties, "uuid", ""))
        from w4a16 import driver

        self._driver: Any = driver
        self.l2_bytes = int(driver.l2_bytes(self.device))
        self.stream: Any = torch.cuda.Stream()
        self.handle = int(self.stream.cuda_stream)
        self._events: list[tuple[Any, Any]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Gpu:
        self.torch.cuda.synchronize()
        self._stack.enter_context(self.torch.no_grad())
        self._stack.enter_context(self.torch.cuda.stream(self.stream))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def synchronize(self) -> None:
        self.stream.synchronize()

    # ---- Graphs ----

    def capture(self, launch: Launch, launches: int, *, torch_graph: bool = False) -> Replay:
        """A graph of launches 0, 1, …. ``torch_graph``: with memory that torch allocates in it.

        The launch must have run before. Raises whatever the launch or the capture raises.
        """
        if torch_graph:
            return _TorchReplay(self.torch, launch, launches)
        with self._driver.capture(self.handle) as capture:
            outputs = [launch(i) for i in range(launches)]
        return _DriverReplay(capture.graph, self.handle, launches, outputs)

    def eager(self, launch: Launch, launches: int) -> Replay:
        """The same without a graph, for what cannot be captured."""
        return _EagerReplay(launch, launches)

    # ---- Time ----

    def rounds(
        self, replays: Sequence[Replay], rounds: int, warm: int, pause: float = 0.0
    ) -> list[Times]:
        """Microseconds of a launch in each round; every round runs each of them once, and begins
        with another one.

        Rounds to warm up come first and are left out. With a pause the GPU is idle so long before
        each round. What runs ahead of a round brings the clocks up after a pause, and keeps the
        GPU busy until the host has put the round on the stream: an idle GPU would wait for the
        host between an event and a graph.
        """
        count = len(replays)
        events = self._pairs(count)
        found: list[list[float]] = [[] for _ in replays]
        for turn in range(warm + rounds):
            if pause:
                self.rest(pause)
            order = [(turn + i) % count for i in range(count)]
            for _ in range(_AHEAD if pause else 1):
                replays[order[-1]].launch()
            for i in order:
                begin, end = events[i]
                begin.record(self.stream)
                replays[i].launch()
                end.record(self.stream)
            self.synchronize()
            if turn >= warm:
                for i, (begin, end) in enumerate(events):
                    found[i].append(begin.elapsed_time(end) * 1e3 / replays[i].launches)
        return [Times(tuple(us)) for us in found]

    def _pairs(self, count: int) -> list[tuple[Any, Any]]:
        while len(self._events) < count:
            event = self.torch.cuda.Event
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
        return self._events[:count]

    def busy(self, replays: Sequence[Replay], seconds: float) -> None:
        """Runs them in turns for at least so long, without a gap, and does not wait at the end."""
        begin = time.monotonic()
        marks: list[Any] = []
        while time.monotonic() - begin < seconds:
            for replay in replays:
                replay.launch()
            mark = self.torch.cuda.Event()
            mark.record(self.stream)
            marks.append(mark)
            if len(marks) > 2:  # two rounds ahead of the GPU, no more
                marks.pop(0).synchronize()

    def rest(self, seconds: float) -> None:
        """Leaves the GPU idle."""
        self.synchronize()
        time.sleep(seconds)


class _DriverReplay:
    method = GRAPH

    def __init__(self, graph: Any, stream: int, launches: int, outputs: Sequence[Any]) -> None:
        self._graph = graph
        self._stream = stream
        self.launches = launches
        self.outputs = outputs

    def launch(self) -> None:
        self._graph.launch(self._stream)

    def close(self) -> None:
        self._graph.close()


class _TorchReplay:
    method = GRAPH

    def __init__(self, torch: Any, launch: Launch, launches: int) -> None:
        # torch.cuda.graph would collect garbage and empty the cache each time: 0.1 s.
        graph = torch.cuda.CUDAGraph()
        outputs = []
        with _capturing(graph):
            for i in range(launches):
                outputs.append(launch(i))
        self._graph: Any = graph
        self.launches = launches
        self.outputs: Sequence[Any] = outputs

    def launch(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        self.outputs = []
        self._graph.reset()


@contextlib.contextmanager
def _capturing(graph: Any) -> Iterator[None]:
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        # The first error says more than the end of a broken capture.
        with contextlib.suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()


class _EagerReplay:
    method = EAGER

    def __init__(self, launch: Launch, launches: int) -> None:
        self._launch = launch
        self.launches = launches
        self.outputs: Sequence[Any] = []

    def launch(self) -> None:
        self.outputs = [self._launch(i) for i in range(self.launches)]

    def close(self) -> None:
        self.outputs = []
