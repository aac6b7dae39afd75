"""Tactics that deal out the stages of all tiles evenly, wherever tiles then begin and end."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from . import reference
from .harness import Guarded, launch
from .library import RUN_OVERLAP, Library, QuantOp, Tactic
from .reference import Tensor, torch

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(scope="module", name="streaming")
def _streaming(library: Library) -> list[Tactic]:
    found = [t for t in library.tactics if t.is_decode and t.uses_workspace]
    if not found:
        pytest.skip("this library has no tactic that streams")
    return found


@dataclass(frozen=True)
class Deal:
    """Tiles, and stages of a tile, beside the number of CTAs."""

    rows: int
    """Of tiles along N."""
    blocks: int
    """Of rows of activations."""
    stages: int


def deals(ctas: int, draw: random.Random) -> list[Deal]:
    """Less than a tile for each CTA, one, several, and what is between."""
    return [
        Deal(1, 1, 1),  # one CTA
        Deal(1, 1, 7),  # a CTA has a stage
        Deal(3, 1, 5),
        Deal(ctas // 8, 1, 19),  # tiles of 8 CTAs, and of 9
        Deal(ctas * 3 // 5, 1, 5),
        Deal(ctas - 1, 1, 3),
        Deal(ctas, 1, 2),
        Deal(ctas + 1, 1, 2),
        Deal(ctas * 5 // 3, 1, 3),
        Deal(2 * ctas - 1, 1, 1),
        Deal(2 * ctas, 1, 1),
        Deal(2 * ctas + 3, 1, 2),
        Deal(ctas // 3, 4, 3),
        Deal(ctas // 2 + 5, 5, 2),
        *(Deal(draw.randint(1, ctas), draw.randint(1, 3), draw.randint(1, 9)) for _ in range(4)),
    ]


def test_every_way_to_deal_out_stages_is_right_and_gives_the_same_bits_again(
    library: Library, streaming: list[Tactic]
) -> None:
    draw = random.Random(reference.SEED)
    sms = torch.cuda.get_device_properties(reference.DEVICE).multi_processor_count
    source = reference.generator("deals")
    results: list[tuple[str, Tensor]] = []
    for tactic in streaming:
        rows, tokens, stage_k = tactic.tile
        for turn, deal in enumerate(deals(sms * (2 if ":o2" in tactic.name else 1), draw)):
            n = deal.rows * rows - 8 * draw.randint(0, rows // 8 - 1)
            m = deal.blocks * tokens - draw.randint(0, tokens - 1)
            k = deal.stages * stage_k - 64 * draw.randint(0, stage_k // 64 - 1)
            op = (QuantOp.GROUP_SCALE, QuantOp.GROUP_SCALE_ZERO)[turn % 2]
            group = 128 if k % 128 == 0 else 64
            weights = reference.random_weights(library, op, n, k, group, source)
            a = reference.randn((m, k), source)
            bias = reference.randn((n,), source) if turn % 3 else None
            name = f"{tactic.name} M={m} N={n} K={k}"
            c = Guarded(m * n * 2)
            outcomes = []
            for flags in (0, RUN_OVERLAP, RUN_OVERLAP):  # the workspace is as the last one left it
                c.arm(m * n * 2)
                torch.cuda.synchronize()
                launch(library, tactic.index, weights, a, c.address, bias=bias, flags=flags)
                outcomes.append(c.inside.clone())
            exact = reference.exact_product(a, weights, bias)
            found = outcomes[0].view(torch.float16).view(exact.shape)
            peer = reference.torch_product(a, weights, bias)
            error = reference.relative_error(found, exact)
            few = (m * n) ** -0.5  # what roundings of so many outputs scatter by
            allowed = (1.05 + few) * reference.relative_error(peer, exact)
            results.append((f"{name}: error", error <= allowed))
            results.append((f"{name}: guard bands", c.intact() == 1))
            results += [(f"{name}: bits", (other == outcomes[0]).all()) for other in outcomes[1:]]
    right = torch.stack([each for _, each in results]).tolist()
    wrong = [name for (name, _), each in zip(results, right, strict=True) if not each]
    assert not wrong, f"W4A16_SEED={reference.SEED}: {wrong}"
