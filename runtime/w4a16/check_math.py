"""The arithmetic that ``w4a16 check`` compares with: torch on the GPU, or numpy on the CPU.

Both know the same three things of a product: what it is exactly (float64 on the stored weights),
what FP16 arithmetic without this library makes of it (the peer), and how far a result is from it.
Scalars may be on the GPU until :meth:`read` fetches many at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from w4a16 import driver
from w4a16.arrays import DeviceArray, to_host

#: Elements (2 bytes) before and after every buffer that a launch writes to: its address is then
#: aligned to the 16 bytes that the C library asks for, and to no more.
GUARD = 4096 + 8
#: All of a buffer before a launch: an FP16 NaN.
POISON = 0x7E7E


@dataclass(frozen=True)
class Operand:
    """An array in host memory, and the same on the GPU."""

    host: Any
    gpu: Any
    address: int


@dataclass(frozen=True)
class Weight:
    """``W [K, N]`` from its stored numbers."""

    exact: Any
    """float64: ``(q - 8) * s + z``, which float64 holds exactly."""
    half: Any
    """Rounded once to FP16: what a matmul without this library multiplies with."""


@dataclass(frozen=True)
class Outcome:
    """What a launch left in its buffer."""

    values: Any
    """float16 ``[m, n]``."""
    bits: Any
    intact: Any
    """1.0 if nothing was written around it."""


class Buffer(Protocol):
    """Memory for a launch to write to, between two bands that it must not touch."""

    @property
    def address(self) -> int: ...

    def arm(self, size: int) -> None:
        """Poisons ``size`` bytes and the bands."""

    def take(self, m: int, n: int) -> Outcome: ...

    def intact(self) -> Any: ...


class Arithmetic(Protocol):
    """torch's or numpy's."""

    name: str
    """What the peer is, in words."""
    on_gpu: bool
    """Whether large products are quick."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """All else is used within it."""
        ...

    @property
    def stream(self) -> int: ...

    def upload(self, array: Any) -> Operand: ...

    def weight(self, q: Any, scales: Any, zeros: Any, group_of_row: Any) -> Weight:
        """From numpy arrays: q ``[K, N]``, scales and zeros (or None) ``[groups, N]``."""
        ...

    def product(self, x: Operand, weight: Weight) -> Any:
        """float64 ``x @ W``."""
        ...

    def add(self, product: Any, bias: Operand | None) -> Any:
        """float64; a new array."""
        ...

    def peer(self, x: Operand, m: int, weight: Weight, bias: Operand | None) -> Any:
        """float16 ``x[:m] @ W + bias`` as it is computed without this library."""
        ...

    def error(self, result: Any, exact: Any) -> Any:
        """Relative Frobenius error; NaN if any value is."""
        ...

    def different(self, result: Any, expected: Any) -> Any:
        """How many values are not equal."""
        ...

    def buffer(self) -> Buffer: ...

    def rows(self, x: Operand, m: int) -> Any:
        """The first rows on the GPU, as :func:`w4a16.linear` takes them."""
        ...

    def result(self, array: Any) -> Any:
        """What :func:`w4a16.linear` gave, for the other methods."""
        ...

    def read(self, scalars: Sequence[Any]) -> list[float]:
        """Waits for the GPU."""
        ...


class TorchArithmetic:
    """Everything on the GPU."""

    on_gpu = True

    def __init__(self, device: int) -> None:
        """Raises ``ImportError`` without torch, ``RuntimeError`` if it does not see the GPU."""
        import torch

        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            raise RuntimeError(f"torch {torch.__version__} does not see GPU {device}")
        self.name = f"torch {torch.__version__}'s FP16 matmul"
        self._torch = torch
        self._device = torch.device("cuda", device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        torch = self._torch
        matmul = torch.backends.cuda.matmul
        # By default torch may add partial sums in FP16, which would make it an easier peer.
        before = matmul.allow_fp16_reduced_precision_reduction
        index = int(self._device.index)
        with torch.cuda.device(self._device), driver.use_device(index), torch.no_grad():
            matmul.allow_fp16_reduced_precision_reduction = False
            try:
                yield
            finally:
                matmul.allow_fp16_reduced_precision_reduction = before

    @property
    def stream(self) -> int:
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    def upload(self, array: Any) -> Operand:
        gpu = self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return Operand(array, gpu, int(gpu.data_ptr()))

    def weight(self, q: Any, scales: Any, zeros: Any, group_of_row: Any) -> Weight:
        groups = self.upload(group_of_row.astype(np.int64)).gpu
        exact = (self.upload(q).gpu.double() - 8) * self.upload(scales).gpu.double()[groups]
        if zeros is not None:
            exact += self.upload(zeros).gpu.double()[groups]
        return Weight(exact, self._rounded(exact))

    def _rounded(self, exact: Any) -> Any:
        """float64 to FP16 in one rounding, half to even; ``.half()`` rounds to float32 before."""
        torch = self._torch
        # |exact| < 2**exponent, by its bits.
        exponent = (exact.view(torch.int64) >> 52 & 0x7FF) - 1022
        unit = ((exponent - 11).clamp_min(-24) + 1023 << 52).view(torch.float64)
        return (torch.round(exact / unit) * unit).half()

    def product(self, x: Operand, weight: Weight) -> Any:
        return x.gpu.double() @ weight.exact

    def add(self, product: Any, bias: Operand | None) -> Any:
        return product if bias is None else product + bias.gpu.double()

    def peer(self, x: Operand, m: int, weight: Weight, bias: Operand | None) -> Any:
        if bias is None:
            return self._torch.matmul(x.gpu[:m], weight.half)
        return self._torch.addmm(bias.gpu, x.gpu[:m], weight.half)

    def error(self, result: Any, exact: Any) -> Any:
        norm = self._torch.linalg.vector_norm
        return norm(result.double() - exact) / norm(exact)

    def different(self, result: Any, expected: Any) -> Any:
        return (result != expected).sum().double()

    def buffer(self) -> Buffer:
        return _TorchBuffer(self._torch, self._device)

    def rows(self, x: Operand, m: int) -> Any:
        return x.gpu[:m]

    def result(self, array: Any) -> Any:
        return array

    def read(self, scalars: Sequence[Any]) -> list[float]:
        if not scalars:
            return []
        torch = self._torch
        stacked = torch.stack([torch.as_tensor(s, device=self._device).double() for s in scalars])
        return [float(value) for value in stacked.tolist()]


class _TorchBuffer:
    def __init__(self, torch: Any, device: Any) -> None:
        self._torch = torch
        self._device = device
        self._storage = self._make(0)
        self._count = 0

    def _make(self, count: int) -> Any:
        torch = self._torch
        return torch.empty(count + 2 * GUARD, dtype=torch.int16, device=self._device)

    @property
    def address(self) -> int:
        return int(self._storage.data_ptr()) + 2 * GUARD

    def arm(self, size: int) -> None:
        self._count = -(-size // 2)
        if self._count + 2 * GUARD > self._storage.numel():
            self._storage = self._make(self._count)
        self._storage[: self._count + 2 * GUARD].fill_(POISON)

    def take(self, m: int, n: int) -> Outcome:
        bits = self._storage[GUARD : GUARD + m * n].clone()
        return Outcome(bits.view(self._torch.float16).view(m, n), bits, self.intact())

    def intact(self) -> Any:
        before = self._storage[:GUARD]
        after = self._storage[GUARD + self._count : 2 * GUARD + self._count]
        return ((before == POISON).all() & (after == POISON).all()).double()


class NumpyArithmetic:
    """Everything on the CPU but the launches themselves."""

    name = "numpy's float32 matmul rounded to FP16"
    on_gpu = False
    stream = 0

    def __init__(self, device: int) -> None:
        self._device = device

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with driver.use_device(self._device), np.errstate(over="ignore", invalid="ignore"):
            yield

    def upload(self, array: Any) -> Operand:
        gpu = DeviceArray.from_numpy(array, self._device)
        return Operand(array, gpu, gpu.address)

    def weight(self, q: Any, scales: Any, zeros: Any, group_of_row: Any) -> Weight:
        exact = (q.astype(np.float64) - 8) * scales.astype(np.float64)[group_of_row]
        if zeros is not None:
            exact += zeros.astype(np.float64)[group_of_row]
        return Weight(exact, exact.astype(np.float16))

    def product(self, x: Operand, weight: Weight) -> Any:
        return x.host.astype(np.float64) @ weight.exact

    def add(self, product: Any, bias: Operand | None) -> Any:
        return product if bias is None else product + bias.host.astype(np.float64)

    def peer(self, x: Operand, m: int, weight: Weight, bias: Operand | None) -> Any:
        result = x.host[:m].astype(np.float32) @ weight.half.astype(np.float32)
        if bias is not None:
            result += bias.host.astype(np.float32)
        return result.astype(np.float16)

    def error(self, result: Any, exact: Any) -> Any:
        return np.linalg.norm(result.astype(np.float64) - exact) / np.linalg.norm(exact)

    def different(self, result: Any, expected: Any) -> Any:
        return np.count_nonzero(result != expected)

    def buffer(self) -> Buffer:
        return _NumpyBuffer(self._device)

    def rows(self, x: Operand, m: int) -> Any:
        return DeviceArray.from_numpy(x.host[:m], self._device)

    def result(self, array: Any) -> Any:
        return to_host(array)

    def read(self, scalars: Sequence[Any]) -> list[float]:
        return [float(scalar) for scalar in scalars]


class _NumpyBuffer:
    def __init__(self, device: int) -> None:
        self._device = device
        self._storage = DeviceArray(2 * GUARD, "int16", device=device)
        self._count = 0

    @property
    def address(self) -> int:
        return self._storage.address + 2 * GUARD

    def arm(self, size: int) -> None:
        self._count = -(-size // 2)
        if self._count + 2 * GUARD > self._storage.size:
            self._storage = DeviceArray(self._count + 2 * GUARD, "int16", device=self._device)
        driver.memset(self._storage.address, POISON & 0xFF, 2 * (self._count + 2 * GUARD), 0)

    def _read(self, first: int, count: int) -> Any:
        host = np.empty(count, np.int16)
        driver.copy_to_host(host, self._storage.address + 2 * first, 0)
        return host

    def take(self, m: int, n: int) -> Outcome:
        bits = self._read(GUARD, m * n)
        return Outcome(bits.view(np.float16).reshape(m, n), bits, self.intact())

    def intact(self) -> Any:
        bands = (self._read(0, GUARD), self._read(GUARD + self._count, GUARD))
        return float(all((band == POISON).all() for band in bands))


def arithmetic_of(device: int, wanted: str | None = None) -> Arithmetic:
    """torch's if it is installed and sees the GPU, otherwise numpy's; or the one that is wanted."""
    if wanted == "numpy":
        return NumpyArithmetic(device)
    try:
        return TorchArithmetic(device)
    except (ImportError, RuntimeError):
        if wanted == "torch":
            raise
        return NumpyArithmetic(device)
