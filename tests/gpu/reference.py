"""Random problems, float64 arithmetic on what is stored, and torch's FP16 product beside it."""

from __future__ import annotations

import os
import secrets
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest

from .library import Library, QuantOp

# Any: the machine that checks types has no torch, the machine that runs this has no pipeline.
torch: Any = pytest.importorskip(
    "torch", reason="these tests compare with torch, which is not installed", exc_type=ImportError
)
Tensor: TypeAlias = Any

SEED = int(os.environ.get("W4A16_SEED") or secrets.randbelow(2**31))
DEVICE: Any = torch.device("cuda")

#: Elements (2 bytes) in front of every buffer given to the library: the address is then aligned
#: to the 16 bytes that the API asks for, and to no more.
OFFSET = 4096 + 8
#: An FP16 NaN that no arithmetic produces.
SENTINEL = 0x7E5A


def generator(name: str) -> Any:
    """Random numbers for one test, from the session's seed and the test's name."""
    made = torch.Generator(device=DEVICE)
    made.manual_seed(SEED * 2**31 + zlib.crc32(name.encode()))
    return made


def place(values: Tensor) -> Tensor:
    """A copy of ``values`` on the device, at an address aligned to 16 bytes only."""
    shift = OFFSET * 2 // values.element_size()
    storage = torch.empty(values.numel() + shift, dtype=values.dtype, device=DEVICE)
    storage[shift:].copy_(values.reshape(-1))
    return storage[shift:].view(values.shape)


def randn(shape: tuple[int, ...], source: Any) -> Tensor:
    return place(torch.randn(shape, generator=source, device=DEVICE).half())


def round_to_half(values: Tensor) -> Tensor:
    """float64 values rounded once, half to even, to what FP16 can hold (still float64).

    ``values.half()`` will not do: torch converts float64 through float32, which rounds twice.
    """
    # |values| < 2 ** exponent; by bits, since pow() need not be exact.
    exponent = (values.view(torch.int64) >> 52 & 0x7FF) - 1022
    unit = ((exponent - 11).clamp_min(-24) + 1023 << 52).view(torch.float64)
    return torch.round(values / unit) * unit


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """``(q - 8) * s + z`` from the stored halves, in float64 and not rounded.

    float64 holds it exactly: every half is a multiple of 2**-24 below 2**16, so the sum is a
    multiple of 2**-24 below 2**20 and needs at most 44 of the 53 bits. ``round_to_half`` of it is
    therefore ``half(fma(q - 8, s, z))``, with the one rounding of the fma.
    """
    rows = q.shape[0] // scales.shape[0]
    exact = (q.double() - 8) * scales.double().repeat_interleave(rows, dim=0)
    if zeros is not None:
        exact += zeros.double().repeat_interleave(rows, dim=0)
    return exact


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A random quantised matrix on the device, packed, and as FP16 and float64 numbers."""

    quant_op: QuantOp
    n: int
    k: int
    group: int
    """As the API takes it: for per column 0 or K."""
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    half: Tensor
    """Rounded once: what torch multiplies with, and what the identity must return."""
    exact: Tensor
    """float64, not rounded: what errors are measured against, the rounding of weights included."""

    def checksum(self) -> Tensor:
        """Changes when a launch writes to its inputs."""
        parts = [self.packed, self.scales.view(torch.int16)]
        if self.zeros is not None:
            parts.append(self.zeros.view(torch.int16))
        return torch.stack([part.sum(dtype=torch.int64) for part in parts])


def random_weights(
    library: Library, quant_op: QuantOp, n: int, k: int, group: int, source: Any
) -> Weights:
    """Scales spread over a factor of 4; zeros from random zero points, or any halves at all."""
    per_column = quant_op is QuantOp.PER_COLUMN
    shape = (1 if per_column else k // group, n)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=source, device=DEVICE) * (high - low) + low

    q = torch.randint(0, 16, (k, n), generator=source, device=DEVICE, dtype=torch.uint8)
    scales = torch.exp2(uniform(-9, -7)).half()
    zeros = None
    if quant_op is QuantOp.GROUP_SCALE_ZERO:
        points = torch.randint(0, 16, shape, generator=source, device=DEVICE)
        anything = torch.randint(0, 2, (1,), generator=source, device=DEVICE).item()
        factor = uniform(-8, 8).double() if anything else 8.0 - points
        zeros = round_to_half(factor * scales.double()).half()
    exact = dequantize(q, scales, zeros)
    return Weights(
        quant_op=quant_op,
        n=n,
        k=k,
        group=group,
        packed=place(pack(library, q)),
        scales=place(scales),
        zeros=None if zeros is None else place(zeros),
        half=round_to_half(exact).half(),
        exact=exact,
    )


def pack(library: Library, q: Tensor) -> Tensor:
    """Nibbles ``[K, N]`` through ``w4a16_pack``, on the CPU."""
    k, n = q.shape
    plain = (q[:, 0::2] | (q[:, 1::2] << 4)).cpu().contiguous()
    packed = torch.empty(library.packed_size(None, k, n), dtype=torch.uint8)
    library.pack(None, plain.data_ptr(), k, n, packed.data_ptr())
    return packed


def exact_product(a: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
    product = a.double() @ weights.exact
    return product if bias is None else product + bias.double()


def torch_product(a: Tensor, weights: Weights, bias: Tensor | None) -> Tensor:
    """What a user without this library computes: FP16 in and out, FP32 sums."""
    if bias is None:
        return torch.matmul(a, weights.half)
    return torch.addmm(bias, a, weights.half)


def relative_error(result: Tensor, exact: Tensor) -> Tensor:
    """Frobenius norm of the difference over that of ``exact``; NaN if any result is NaN."""
    norm = torch.linalg.vector_norm
    return norm(result.double() - exact) / norm(exact)
