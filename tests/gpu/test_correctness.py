"""Every tactic against float64 arithmetic, beside torch's FP16 product of the same numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from . import reference
from .conftest import Table
from .expected import Expected
from .harness import Guarded, launch, problem_of
from .library import AUTO, Library, QuantOp, Status, Tactic
from .reference import Tensor, Weights, torch

ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100, 300, 1024)
GROUPS = (32, 64, 128, 256)
#: Enough outputs for the ratio of two errors to be a property of the kernel and not of luck.
ENOUGH_OUTPUTS = 4096
#: Errors in one row go together (all columns see the same activations), so few rows say little.
ENOUGH_ROWS = 32

#: (N, K): the smallest, odd multiples of the units of N (8) and K (64), many rounds of the GEMV.
SHAPES = (
    (8, 64),
    (296, 192),
    (1032, 1088),
    (2056, 2304),
    (4104, 4096),
    (1544, 8192),
    (4096, 28672),
)
MORE_SHAPES = ((28672, 4096), (10240, 8192), (4096, 14336), (24, 28672), (65544, 64))


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    k: int
    quant_op: QuantOp
    group: int

    def __str__(self) -> str:
        return f"{self.name}-{self.quant_op.label}-g{self.group}"


def cases(full: bool) -> list[Case]:
    shapes = [(f"{n}x{k}", n, k) for n, k in SHAPES + (MORE_SHAPES if full else ())]
    draw = random.Random(reference.SEED)
    for turn in range(8 if full else 3):
        n, k = 8 * draw.randint(1, 600), 64 * draw.randint(1, 120)
        shapes.append((f"random{turn}", n, k))
    made: list[Case] = []
    for turn, (name, n, k) in enumerate(shapes):
        # Per column, both group_size = 0 and group_size = K are allowed.
        made.append(Case(name, n, k, QuantOp.PER_COLUMN, k if turn % 2 else 0))
        groups = [group for group in GROUPS if k % group == 0]
        if k <= 2304 and k not in groups:
            groups.append(k)  # one group, of a size that is no power of two
        for op in (QuantOp.GROUP_SCALE, QuantOp.GROUP_SCALE_ZERO):
            made.extend(Case(name, n, k, op, group) for group in groups)
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full", default=False)
        metafunc.parametrize("case", cases(full), ids=str)


def limit_of(tactic: Tactic, weights: Weights, by_auto: bool) -> float:
    """The largest allowed error, as a multiple of that of torch's FP16 matmul."""
    if tactic.is_decode:
        return 1.05
    if not tactic.is_gemv:
        return 1.1
    # Upstream's GEMV sums in FP16, with zeros over whole columns.
    beyond = weights.quant_op is QuantOp.GROUP_SCALE_ZERO and weights.k > 4096
    return 9.0 if beyond and not by_auto else 4.0


@dataclass(frozen=True, kw_only=True)
class Operands:
    weights: Weights
    a: Tensor
    bias: Tensor
    exact: Tensor
    """A · W without bias."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """torch's result on the first rows of A, and the exact one."""

    exact: Tensor
    error: Tensor


class Measurement:
    """All tactics on one weight matrix; device results are read once for each M."""

    def __init__(self, library: Library, expected: Expected, operands: Operands) -> None:
        self.library = library
        self.expected = expected
        self.operands = operands
        self.c = Guarded(max(ROWS) * operands.weights.n * 2)
        self.workspace = Guarded(0)
        self.peers: dict[tuple[int, bool], Peer] = {}

    def rows(self, m: int, with_bias: bool) -> list[dict[str, Any]]:
        weights = self.operands.weights
        problem = problem_of(weights, m, with_bias)
        made: list[dict[str, Any]] = []
        values: list[Tensor] = []
        for tactic in (*self.library.tactics, None):
            name = "auto" if tactic is None else tactic.name
            index = AUTO if tactic is None else tactic.index
            if tactic is None:
                must = any(self.expected.supports(name, problem) for name in self.expected.names)
            else:
                must = self.expected.supports(name, problem)
            supported = self.library.status_of_supports(index, problem) is Status.OK
            assert supported == must, f"{name}, M={m}, bias={with_bias}: supported is {supported}"
            if not supported:
                continue
            taken = self.library.auto_tactic(problem) if tactic is None else tactic
            row = {
                "tactic": name,
                "quant_op": weights.quant_op.label,
                "group": weights.group,
                "m": m,
                "n": weights.n,
                "k": weights.k,
                "bias": with_bias,
                "limit": limit_of(taken, weights, tactic is None),
            }
            if tactic is None:
                row["took"] = taken.name
            made.append(row)
            # Every other launch goes by name.
            given = index if len(made) % 2 else name
            values.append(self.measure(given, taken, m, with_bias, index))
        for row, (error, peer, clean) in zip(made, torch.stack(values).tolist(), strict=True):
            ratio = error / peer
            row.update(
                rel_err=_short(error),
                torch_err=_short(peer),
                ratio=_short(ratio),
                ok=ratio <= row["limit"] and clean == 1.0,
            )
            if clean != 1.0:
                row["wrote_outside"] = True
        return made

    def measure(
        self, given: int | str, taken: Tactic, m: int, with_bias: bool, index: int
    ) -> Tensor:
        """Error, torch's error, and whether the guard bands were left alone."""
        weights = self.operands.weights
        bias = self.operands.bias if with_bias else None
        repeats = 1
        # What rounds its weights as torch does errs as torch does, however few the outputs.
        if taken.kind != "gemm":
            wanted = max(ENOUGH_OUTPUTS // (m * weights.n), -(-ENOUGH_ROWS // m))
            repeats = max(1, min(wanted, max(ROWS) // m))
        size = self.library.workspace_size(index, problem_of(weights, m, with_bias))
        if size > self.workspace.capacity:
            self.workspace = Guarded(size)
        self.c.arm(repeats * m * weights.n * 2)
        self.workspace.arm(size)
        for turn in range(repeats):
            launch(
                self.library,
                given,
                weights,
                self.operands.a[turn * m : (turn + 1) * m],
                self.c.address + turn * m * weights.n * 2,
                bias=bias,
                workspace=self.workspace.address if size else 0,
                workspace_bytes=size,
            )
        peer = self.peer(repeats * m, with_bias)
        error = reference.relative_error(self.c.halves(repeats * m, weights.n), peer.exact)
        return torch.stack([error, peer.error, self.c.intact() * self.workspace.intact()])

    def peer(self, rows: int, with_bias: bool) -> Peer:
        key = rows, with_bias
        if key not in self.peers:
            if len(self.peers) > 4:
                self.peers.clear()
            bias = self.operands.bias if with_bias else None
            exact = self.operands.exact[:rows]
            if bias is not None:
                exact = exact + bias.double()
            result = reference.torch_product(self.operands.a[:rows], self.operands.weights, bias)
            self.peers[key] = Peer(exact=exact, error=reference.relative_error(result, exact))
        return self.peers[key]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@pytest.mark.usefixtures("gpu")
def test_every_tactic_is_as_accurate_as_its_limit_and_writes_nothing_but_its_output(
    case: Case,
    library: Library,
    expected: Expected,
    table: Table,
    request: pytest.FixtureRequest,
) -> None:
    source = reference.generator(str(case))
    weights = reference.random_weights(library, case.quant_op, case.n, case.k, case.group, source)
    a = reference.randn((max(ROWS), case.k), source)
    exact = reference.exact_product(a, weights)
    bias = reference.place(
        (torch.randn(case.n, generator=source, device=reference.DEVICE) * exact.std()).half()
    )
    before = weights.checksum(), a.clone(), bias.clone()
    operands = Operands(weights=weights, a=a, bias=bias, exact=exact)
    measurement = Measurement(library, expected, operands)
    both = request.config.getoption("--full", default=False)
    start = case.n // 8 + case.group // 64

    rows: list[dict[str, Any]] = []
    for turn, m in enumerate(ROWS):
        for with_bias in (False, True) if both else (bool((start + turn) % 2),):
            rows.extend(measurement.rows(m, with_bias))
    table.rows.extend(rows)

    wrong = [row for row in rows if not row["ok"]]
    shown = "\n".join(map(str, wrong[:20]))
    assert not wrong, f"{len(wrong)} of {len(rows)}, W4A16_SEED={reference.SEED}:\n{shown}"
    assert torch.equal(weights.checksum(), before[0]), "a launch changed the weights"
    assert torch.equal(a, before[1]), "a launch changed the activations"
    assert torch.equal(bias, before[2]), "a launch changed the bias"


def test_rounding_to_half_agrees_with_arithmetic_in_integers() -> None:
    """The reference's own rounding, on values that float32 would round a second time."""
    halfway = 1 + 2.0**-11
    values = [halfway + 2.0**-40, halfway - 2.0**-40, halfway, 3 * 2.0**-26, 2.0**-25, 1.5]
    values += [-value for value in values] + [0.0, 2.0**-24, 65504.0]
    wanted = []
    for value in values:
        unit = 2.0**-24
        while abs(value) >= unit * 2048:
            unit *= 2
        wanted.append(round(value / unit) * unit)
    found = reference.round_to_half(torch.tensor(values, dtype=torch.float64))
    assert found.tolist() == wanted
