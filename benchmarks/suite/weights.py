"""Operands on the GPU: one weight for all contenders and M, activations and outputs for one M.

Everything is rotated: launch i of a graph reads copy ``i mod copies`` of the weight and writes
another output than the launch before, so that nothing is found in the L2 that a model would not
find there. Scales have 5 significant bits: then ``(q - zero) · scale`` is a number of FP16 and
``(8 - zero) · scale`` one of BF16, and every contender multiplies with exactly the same weights,
whatever its formula.
"""

from __future__ import annotations

from typing import Any

from benchmarks.suite.cases import Weight

SEED = 20250806
#: Bytes that a graph's launches read in turn before any of them is read again, at least …
ROTATION = 400 << 20
#: … and at least so many times what the L2 holds.
TIMES_L2 = 3
#: Launches in a graph, and from MANY_ROWS on, where one takes long.
LAUNCHES, FEW_LAUNCHES, MANY_ROWS = 40, 10, 512
#: Rows and columns that results are compared at.
CHECKED_ROWS, CHECKED_COLUMNS = 64, 128

_ALIGNMENT = 256


def copies_of(size: int, rotation: int, most: int = LAUNCHES) -> int:
    """How many operands of ``size`` bytes take turns: one more than fit into the rotation."""
    return max(2, min(most, rotation // max(size, 1) + 1))


def rotation_bytes(l2_bytes: int) -> int:
    return max(ROTATION, TIMES_L2 * l2_bytes)


def launches_of(size: int, l2_bytes: int, m: int) -> int:
    """Launches in a graph; where few would do, still enough to read three times the L2."""
    if m < MANY_ROWS:
        return LAUNCHES
    cold = -(-TIMES_L2 * l2_bytes // max(size, 1))
    return max(FEW_LAUNCHES, min(LAUNCHES, cold))


class Weights:
    """A random weight on the GPU, packed for our kernels, in so many copies as the rotation wants,
    and as plain numbers for everybody else."""

    def __init__(self, torch: Any, weight: Weight, l2_bytes: int, *, device: str = "cuda") -> None:
        import w4a16

        self.torch = torch
        self.weight = weight
        self.l2_bytes = l2_bytes
        self.device = device
        n, k, groups = weight.n, weight.k, weight.groups
        random = torch.Generator(device).manual_seed(SEED + n + 3 * k + weight.group)
        self.random = random
        self.q: Any = torch.randint(
            0, 16, (k, n), dtype=torch.uint8, device=device, generator=random
        )
        """uint8 ``[K, N]``, 0..15."""
        mantissa = torch.randint(16, 32, (groups, n), device=device, generator=random)
        exponent = torch.randint(-12, -10, (groups, n), device=device, generator=random)
        self.scales: Any = (mantissa * torch.exp2(exponent.float())).half()
        """float16 ``[groups, N]``, 5 significant bits, 2**-8 to 2**-6."""
        self.zero_points: Any = None
        """uint8 ``[groups, N]``, 0..15; None: all 8."""
        if weight.zeros:
            self.zero_points = torch.randint(
                0, 16, (groups, n), dtype=torch.uint8, device=device, generator=random
            )
        packed = w4a16.pack(
            q=self.q,
            scales=self.scales,
            zeros=None if self.zero_points is None else self.zero_points.float(),
            group_size=weight.group or -1,
        )
        self.quant_op = int(packed.quant_op)
        self.group_size = packed.group_size
        self._lay_out([packed.packed, packed.scales, packed.zeros])
        self.columns = self._sampled(n, CHECKED_COLUMNS)
        self.exact: Any = self._exact()
        """float64 ``[K, columns]``: the sampled columns of the weight."""

    # ---- Packed for our kernels ----

    def _lay_out(self, parts: list[Any]) -> None:
        """Each copy in one piece: packed values, scales, zeros."""
        torch = self.torch
        flat = [part.contiguous().view(torch.uint8).flatten() for part in parts if part is not None]
        self._offsets, size = [], 0
        for part in flat:
            self._offsets.append(size)
            size += -(-part.numel() // _ALIGNMENT) * _ALIGNMENT
        self.size = size
        self.copies = copies_of(size, rotation_bytes(self.l2_bytes))
        self._blocks: Any = torch.zeros((self.copies, size), dtype=torch.uint8, device=self.device)
        for offset, part in zip(self._offsets, flat, strict=True):
            self._blocks[:, offset : offset + part.numel()] = part

    def address(self, i: int) -> int:
        """Of copy ``i mod copies``: the packed values come first."""
        return int(self._blocks.data_ptr()) + i % self.copies * self.size

    def scales_address(self, i: int) -> int:
        return self.address(i) + self._offsets[1]

    def zeros_address(self, i: int) -> int | None:
        return self.address(i) + self._offsets[2] if self.weight.zeros else None

    def launches(self, m: int) -> int:
        return launches_of(self.size, self.l2_bytes, m)

    def turns(self, tensors: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """These tensors and copies of them: so many as the rotation wants."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        count = copies_of(size, rotation_bytes(self.l2_bytes))
        return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]

    # ---- As numbers ----

    def half(self) -> Any:
        """float16 ``[N, K]``, exactly what everybody multiplies with."""
        torch, weight = self.torch, self.weight
        size = weight.k // weight.groups
        out = torch.empty((weight.n, weight.k), dtype=torch.float16, device=self.device)
        for group in range(weight.groups):
            rows = slice(group * size, (group + 1) * size)
            zero = 8 if self.zero_points is None else self.zero_points[group].half()
            out[:, rows] = ((self.q[rows].half() - zero) * self.scales[group]).t()
        return out

    def _exact(self) -> Any:
        repeats = self.weight.k // self.weight.groups
        q = self.q[:, self.columns].double()
        scales = self.scales[:, self.columns].double().repeat_interleave(repeats, 0)
        if self.zero_points is None:
            return (q - 8) * scales
        zeros = self.zero_points[:, self.columns].double().repeat_interleave(repeats, 0)
        return (q - zeros) * scales

    def _sampled(self, size: int, count: int) -> Any:
        """So many sorted indices, first and last among them."""
        torch = self.torch
        if size <= count:
            return torch.arange(size, device=self.device)
        edge = count // 4
        middle = torch.randperm(size - 2 * edge, device=self.device, generator=self.random)
        chosen = [
            torch.arange(edge, device=self.device),
            middle[: count - 2 * edge] + edge,
            torch.arange(size - edge, size, device=self.device),
        ]
        return torch.cat(chosen).sort().values


class Rows:
    """Activations and outputs of M rows, in slots that take turns."""

    def __init__(self, weights: Weights, m: int) -> None:
        torch, weight = weights.torch, weights.weight
        self.torch = torch
        self.weights = weights
        self.m = m
        self.launches = weights.launches(m)
        size = m * (weight.k + weight.n) * 2
        self.slots = copies_of(size, rotation_bytes(weights.l2_bytes), self.launches)
        self.x: Any = torch.randn(
            (self.slots, m, weight.k),
            dtype=torch.float16,
            device=weights.device,
            generator=weights.random,
        )
        self.out: Any = torch.empty(
            (self.slots, m, weight.n), dtype=torch.float16, device=weights.device
        )
        self._rows = weights._sampled(m, CHECKED_ROWS)
        self._expected: dict[int, Any] = {}

    def poison(self) -> None:
        """Fills the outputs with NaN."""
        self.out.view(self.torch.uint8).fill_(0xFF)

    def expected(self, slot: int) -> Any:
        """float64 at the sampled rows and columns."""
        if slot not in self._expected:
            self._expected[slot] = self.x[slot][self._rows].double() @ self.weights.exact
        return self._expected[slot]

    def error(self, result: Any, slot: int) -> float:
        """Relative Frobenius error of a result ``[M, N]``; infinite if any value is not finite."""
        torch = self.torch
        if tuple(result.shape) != (self.m, self.weights.weight.n):
            return float("inf")
        exact = self.expected(slot)
        found = result[self._rows][:, self.weights.columns].double()
        relative = torch.linalg.norm(found - exact) / torch.linalg.norm(exact)
        finite = torch.isfinite(result).all()
        return float(torch.where(finite, relative, float("inf")))
