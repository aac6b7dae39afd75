"""Random weights on a GPU, with what they stand for in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import w4a16

from tests.runtime.checkpoints import Case, case_of, weight

torch: Any = pytest.importorskip("torch", reason="these tests run torch's operators")

NAMES = ("packed", "scales", "zeros", "columns", "bias")
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "per column": {"symmetric": True, "group_size": -1},
    "zeros and bias": {"bias": True},
    "act-order": {"act_order": "shuffled", "bias": True},
    "padded": {"k": 1000, "n": 301, "bias": True},
}
#: Upstream's GEMV, which small M may take, sums in FP16; a wrong layout or element gives far more.
LIMIT = 3e-3


class Product:
    """A weight as the arguments of the operators, and as numbers."""

    def __init__(self, kind: str = "symmetric", *, seed: int = 1, **more: Any) -> None:
        chosen = {"format": "plain", "k": 1024, "n": 320, "group_size": 128, **KINDS[kind], **more}
        rng = np.random.default_rng(seed)
        case = case_of(rng, **chosen)
        scales = np.exp2(rng.uniform(-9, -7, case.scales.shape)).astype(np.float16)
        self.case: Case = replace(case, scales=scales)
        positional, named = self.case.arguments()
        self.host: Any = w4a16.pack(*positional, **named)
        tensors = {
            name: torch.from_numpy(array).cuda() for name, array in self.host.arrays().items()
        }
        self.weight = tuple(tensors.get(name) for name in NAMES)
        self.k, self.n = self.case.k, self.case.n
        self.w = torch.from_numpy(weight(self.case)).cuda()
        """FP16, what the kernels multiply with."""

    @property
    def packed(self) -> Any:
        """With torch's tensors."""
        arrays = dict(zip(NAMES, self.weight, strict=True))
        return w4a16.PackedWeight(**arrays, in_features=self.k, out_features=self.n)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What follows ``x``."""
        return (*self.weight, self.k, self.n)

    def x(self, *leading: int, seed: int = 2) -> Any:
        random = torch.Generator("cuda").manual_seed(seed)
        return torch.randn((*leading, self.k), generator=random, device="cuda").half()

    def exact(self, x: Any) -> Any:
        product = x.double() @ self.w.double()
        if self.case.bias is not None:
            product += torch.from_numpy(self.case.bias).cuda().double()
        return product

    def check(self, found: Any, x: Any, limit: float = LIMIT) -> None:
        """Waits for the GPU."""
        exact = self.exact(x)
        assert found.shape == exact.shape
        assert found.dtype == torch.float16
        norm = torch.linalg.vector_norm
        error = (norm(found.double() - exact) / norm(exact)).item()
        assert error <= limit, f"relative error {error:.2e}, limit {limit:.0e}"


def poison() -> None:
    """Fills memory that torch's allocator has at hand, for small and large outputs, with NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        held = [torch.full((size,), torch.nan, dtype=torch.float16, device="cuda") for _ in "1234"]
        del held
