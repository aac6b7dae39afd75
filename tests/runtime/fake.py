"""A stand-in for libcuda, so that what the package does with a GPU's memory runs without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from w4a16 import arrays, driver

_SOURCE = Path(__file__).with_name("fake_driver.c")


class FakeDriver:
    """One GPU named ``Fake H200``; ``calls`` are those of the driver that a test may ask about."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        for name, kind in (("log", ctypes.c_char_p), ("misuse", ctypes.c_char_p)):
            getattr(self._dll, f"fake_{name}").restype = kind
        for name in ("work", "before"):
            function = getattr(self._dll, f"fake_{name}")
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_uint64
        self._dll.fake_before_last_free.restype = ctypes.c_uint64
        self.reset()
        self._before = self.live

    @property
    def live(self) -> int:
        """Blocks of memory that were allocated and not freed."""
        return int(self._dll.fake_live())

    @property
    def leaked(self) -> int:
        """Of those, the ones since the test began."""
        return self.live - self._before

    @property
    def calls(self) -> list[str]:
        log: bytes = self._dll.fake_log()
        return log.decode().split()

    def reset(self) -> None:
        """Forgets the calls."""
        self._dll.fake_reset()

    @property
    def misuse(self) -> list[str]:
        """What would have crashed, or spoiled a capture: a test asserts that there is nothing."""
        log: bytes = self._dll.fake_misuse()
        return log.decode().splitlines()

    @property
    def events(self) -> int:
        """Events that are there."""
        return int(self._dll.fake_events())

    # ---- What other programs do ----

    def stream(self, *, blocking: bool = False) -> int:
        """A stream of another program; ``blocking``: it and the legacy default stream wait for each
        other."""
        handle = ctypes.c_void_p()
        self._dll.cuStreamCreate(ctypes.byref(handle), 0 if blocking else 1)
        return int(handle.value or 0)

    def destroy(self, stream: int) -> None:
        self._dll.cuStreamDestroy_v2(ctypes.c_void_p(stream))

    def work(self, stream: int) -> int:
        """A piece of work is put on a stream; at most 64 in a test."""
        piece = int(self._dll.fake_work(stream))
        assert piece
        return piece

    def comes_before(self, piece: int, stream: int) -> bool:
        """Whether what is put on a stream from now on begins after a piece of work."""
        return bool(self._dll.fake_before(stream) & piece)

    def freed_after(self, piece: int) -> bool:
        """Whether memory was last freed after a piece of work."""
        return bool(self._dll.fake_before_last_free() & piece)

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """Another program captures a stream."""
        graph = ctypes.c_void_p()
        assert self._dll.cuStreamBeginCapture_v2(ctypes.c_void_p(stream), 1) == 0
        yield
        assert self._dll.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) == 0

    # ---- How it behaves ----

    def has_pools(self, on: bool) -> None:
        self._dll.fake_pools(int(on))

    def fail(self, status: int) -> None:
        """The next ``cuInit`` fails."""
        self._dll.fake_fail(status)


def install(folder: Path, patch: pytest.MonkeyPatch) -> FakeDriver:
    """Compiles the stand-in and lets ``w4a16.driver`` load it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stand-in of libcuda")
    path = folder / "libcuda.so.1"
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(path), str(_SOURCE)]
    subprocess.run(command, check=True)
    patch.setattr(driver, "LIBRARY_NAME", str(path))
    patch.setattr(driver, "_loaded", None)
    patch.setattr(arrays, "_dead", deque())
    return FakeDriver(path)
