"""With the identity for A, the product is the dequantised weight itself, to the bit."""

from __future__ import annotations

import pytest

from . import reference
from .expected import Expected
from .harness import Guarded, launch, problem_of
from .library import Library, QuantOp, Tactic
from .reference import Tensor, Weights, torch

N, K = 1032, 1088


def product_with_identity(
    library: Library, tactic: Tactic, weights: Weights, identity: Tensor, block: int
) -> Tensor:
    """The identity times W, ``block`` rows at a time."""
    c = Guarded(weights.k * weights.n * 2)
    c.arm(weights.k * weights.n * 2)
    extents = {block, weights.k % block or block}  # all blocks but the last, and the last
    size = max(
        library.workspace_size(tactic.index, problem_of(weights, extent, False))
        for extent in extents
    )
    workspace = Guarded(size)
    workspace.arm(size)
    for first in range(0, weights.k, block):
        rows = identity[first : first + block]
        launch(
            library,
            tactic.index,
            weights,
            rows,
            c.address + first * weights.n * 2,
            workspace=workspace.address if size else 0,
            workspace_bytes=size,
        )
    assert c.intact().item() == 1, f"{tactic.name} wrote outside its output"
    return c.halves(weights.k, weights.n)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("op", "group"),
    [
        (QuantOp.PER_COLUMN, 0),
        (QuantOp.PER_COLUMN, K),
        (QuantOp.GROUP_SCALE, 32),
        (QuantOp.GROUP_SCALE, 64),
        (QuantOp.GROUP_SCALE, K),
        (QuantOp.GROUP_SCALE_ZERO, 32),
        (QuantOp.GROUP_SCALE_ZERO, 64),
        (QuantOp.GROUP_SCALE_ZERO, K),
    ],
    ids=lambda value: value.label if isinstance(value, QuantOp) else f"g{value}",
)
def test_identity_returns_each_weight_rounded_once(
    library: Library, expected: Expected, op: QuantOp, group: int
) -> None:
    source = reference.generator(f"identity-{op.label}-{group}")
    weights = reference.random_weights(library, op, N, K, group, source)
    identity = reference.place(torch.eye(K, device=reference.DEVICE).half())

    wrong: list[str] = []
    tried = 0
    for tactic in library.tactics:
        # K rows at once; the GEMV takes 15, and 1088 = 72 * 15 + 8; a block of 100 leaves 88.
        few = (15, 8, 1) if tactic.is_gemv else (K, 100, 8, 3) if tactic.is_decode else (K, 100)
        for block in few:
            if not expected.supports(tactic.name, problem_of(weights, block, False)):
                continue
            tried += 1
            result = product_with_identity(library, tactic, weights, identity, block)
            differ = int((result != weights.half).sum().item())
            if differ:
                wrong.append(f"{tactic.name}, {block} rows: {differ} of {N * K} weights differ")
    if not tried:
        pytest.skip("no tactic of this library takes such a group")
    assert not wrong, f"W4A16_SEED={reference.SEED}:\n" + "\n".join(wrong)
