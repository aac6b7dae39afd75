"""The benchmark's operands and contenders with torch on a CPU: layouts, and what is right."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from w4a16.library import LIBRARY, QuantOp

from benchmarks.suite.cases import Case, Weight
from benchmarks.suite.contenders.base import LIMIT, nibbles
from benchmarks.suite.contenders.dense import Cublas
from benchmarks.suite.contenders.library import Library
from benchmarks.suite.weights import Rows, Weights

torch: Any = pytest.importorskip("torch", reason="the benchmark's operands are torch's tensors")

WEIGHTS = [
    Weight(256, 512, 128),
    Weight(264, 512, 128, True),
    Weight(256, 512, 0),
    Weight(256, 512, 0, True),
    Weight(64, 256, 64, True),
]


def made(weight: Weight) -> Weights:
    return Weights(torch, weight, 1 << 20, device="cpu")


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_fp16_holds_the_weights_exactly(weight: Weight) -> None:
    weights = made(weight)
    exact = weights.half()[weights.columns].double().t()
    assert torch.equal(exact, weights.exact)
    assert weights.exact.abs().max() > 0


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_zeros_that_tables_hold_are_numbers_of_bf16(weight: Weight) -> None:
    weights = made(weight)
    zeros = torch.zeros_like(weights.scales)
    if weights.zero_points is not None:
        zeros = (8 - weights.zero_points.half()) * weights.scales
    for table in (weights.scales, zeros):
        assert torch.equal(table.bfloat16().half(), table)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_every_copy_holds_the_packed_weight_its_scales_and_its_zeros(weight: Weight) -> None:
    weights = made(weight)
    n, k, groups = weight.n, weight.k, weight.groups
    for i in (0, 1, weights.copies - 1, weights.copies):
        plain = np.empty((k, n // 2), np.uint8)
        LIBRARY.unpack(weights.address(i), k, n, plain.ctypes.data, threads=1)
        q = np.stack([plain & 15, plain >> 4], axis=-1).reshape(k, n)
        assert np.array_equal(q, weights.q.numpy())
        assert np.array_equal(_table(weights.scales_address(i), groups, n), weights.scales.numpy())
        address = weights.zeros_address(i)
        assert (address is None) == (weights.zero_points is None)
        if address is not None:
            expected = ((8 - weights.zero_points.half()) * weights.scales).numpy()
            assert np.array_equal(_table(address, groups, n), expected)
    assert weights.address(weights.copies) == weights.address(0) != weights.address(1)
    assert weights.size >= weight.bytes
    op = QuantOp.GROUP_SCALE_ZERO if weight.zeros else QuantOp.GROUP_SCALE
    assert weights.quant_op == (QuantOp.PER_COLUMN if groups == 1 and not weight.zeros else op)


def _table(address: int, groups: int, n: int) -> Any:
    data = ctypes.string_at(address, groups * n * 2)
    return np.frombuffer(data, np.float16).reshape(groups, n)


def test_a_right_product_is_right_and_others_are_not() -> None:
    weights = made(WEIGHTS[1])
    rows = Rows(weights, 70)
    half = weights.half()
    good = (rows.x[0].float() @ half.float().t()).half()
    assert rows.error(good, 0) < 5e-4
    assert rows.error(good, 1) > 0.5, "other activations"
    assert rows.error(good[:, :-8], 0) == float("inf")
    for row, column in ((0, 0), (69, -1)):
        bad = good.clone()
        bad[row, column] += 10
        assert rows.error(bad, 0) > LIMIT
    bad = good.clone()
    bad[33, 100] = float("nan")
    assert rows.error(bad, 0) == float("inf")
    rows.poison()
    assert rows.out.isnan().all()
    assert rows.error(rows.out[0], 0) == float("inf")


def test_fp16_through_torch_is_right_in_every_slot() -> None:
    weights = made(WEIGHTS[0])
    rows = Rows(weights, 3)
    assert rows.slots > 2
    (run,) = Cublas().prepare(weights).runs(rows)
    rows.poison()
    for i in range(rows.launches):
        run.launch(i)
    assert max(rows.error(rows.out[slot], slot) for slot in range(rows.slots)) < LIMIT


def test_words_hold_eight_values_the_first_one_lowest() -> None:
    values = torch.arange(32, dtype=torch.uint8).reshape(2, 16) % 16
    words = nibbles(values)
    assert words.dtype == torch.int32
    assert words.shape == (2, 2)
    assert int(words[0, 0]) == 0x76543210
    assert int(words[0, 1]) & 0xFFFFFFFF == 0xFEDCBA98


def test_copies_for_peers_take_turns_and_are_equal() -> None:
    weights = made(WEIGHTS[0])
    turns = weights.turns((weights.scales, weights.q))
    assert len(turns) > 2
    assert len({one.data_ptr() for one, _ in turns}) == len(turns)
    assert all(torch.equal(one, weights.scales) for one, _ in turns)


@pytest.mark.parametrize("weight", [*WEIGHTS, Weight(4096, 4096, 128)], ids=str)
def test_every_tactic_that_takes_a_case_is_a_candidate_if_all_are_asked_for(
    weight: Weight,
) -> None:
    library = Library(0, 0, everything=True)
    case = Case(weight, 1)
    problem = library.problem(case)
    able = {t.name for t in LIBRARY.tactics if not LIBRARY.why_unsupported(t.index, problem)}
    assert {tactic.name for tactic in library.candidates(case)} == able
    assert able
    some = {tactic.name for tactic in Library(0, 0).candidates(case)}
    assert some <= able
    assert some


def test_a_case_is_described_as_the_package_describes_its_packed_weight() -> None:
    for weight in WEIGHTS:
        problem = Library(0, 0).problem(Case(weight, 5))
        weights = made(weight)
        assert (problem.quant_op, problem.group_size) == (weights.quant_op, weights.group_size)
        assert (problem.m, problem.n, problem.k) == (5, weight.n, weight.k)
