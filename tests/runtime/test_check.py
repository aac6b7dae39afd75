"""``w4a16 check`` on stand-ins for the GPU: it passes what is right, and sees what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from w4a16 import check, check_formats, packing, tactics
from w4a16.check_formats import FORMATS, GROUP, checkpoint
from w4a16.check_math import GUARD, NumpyArithmetic, TorchArithmetic
from w4a16.errors import ArgumentError, DeviceError
from w4a16.library import LIBRARY, Problem, QuantOp, Tactic

from tests.runtime import checkpoints, fake, fake_kernels
from tests.runtime.fake_kernels import FakeKernels

SCOPE_OF = check.scope_of  # before a test replaces it
SMALL = check.Scope(
    shapes=((64, 256), (40, 384)),
    rows=(1, 7, 33),
    groups=(64, 128),
    format_shape=(40, 384),
)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    """A GPU that computes with numpy, and a library of a GEMM and a GEMV, as far as it has them."""
    fake.install(tmp_path, monkeypatch)
    monkeypatch.setenv("W4A16_CACHE", "off")
    made = fake_kernels.install(monkeypatch)
    gemms = [tactic for tactic in LIBRARY.tactics if tactic.kind == "gemm"]
    gemvs = [tactic for tactic in LIBRARY.tactics if tactic.kind == "gemv"]
    kept = {-1, *(tactic.index for tactic in (*gemms[:1], *gemvs[:1]))}
    whole = LIBRARY.why_unsupported

    def why_unsupported(tactic: int, problem: Problem) -> str:
        return whole(tactic, problem) if tactic in kept else "not in this test"

    monkeypatch.setattr(LIBRARY, "why_unsupported", why_unsupported)
    monkeypatch.setattr(check, "scope_of", lambda size, on_gpu: SMALL)
    tactics.forget()
    yield made
    tactics.forget()


def gemm() -> Tactic:
    return next(tactic for tactic in LIBRARY.tactics if tactic.kind == "gemm")


def run(**arguments: Any) -> check.Report:
    return check.run(0, seed=1, arithmetic="numpy", **arguments)


# ---- What is right ----


def test_right_kernels_pass_and_everything_that_they_support_was_launched(
    kernels: FakeKernels,
) -> None:
    seen: list[tuple[int, int, str]] = []
    report = run(progress=lambda done, total, text: seen.append((done, total, text)))
    assert report.failures == ()
    assert report.ok
    assert not report.aborted
    assert report.peer == "numpy's float32 matmul rounded to FP16"
    products = {
        (row.n, row.k, row.quant_op, row.group_size, row.m)
        for row in report.rows
        if row.name == gemm().name and row.test == "product"
    }
    listed = {group for tactic in LIBRARY.tactics for group in tactic.groups}
    groups = sorted(g for g in {*SMALL.groups, *listed} if g % gemm().group_multiple == 0)
    wanted = {
        (n, k, op.name.lower(), group, m)
        for n, k in SMALL.shapes
        for op in QuantOp
        for group in ((0,) if op is QuantOp.PER_COLUMN else groups)
        if k % (group or k) == 0
        for m in SMALL.rows
    }
    assert products == wanted
    assert {row.bias for row in report.rows} == {False, True}
    identities = [row for row in report.rows if row.test == "identity" and row.part == "tactic"]
    assert {(row.quant_op, row.group_size) for row in identities} == {
        (op, group) for n, k, op, group, m in wanted if (n, k) == SMALL.shapes[0]
    }
    formats = {row.name for row in report.rows if row.part == "format"}
    assert formats == {format.name for format in FORMATS}
    auto = [row for row in report.rows if row.tactic.startswith("auto (")]
    assert {(row.name, row.m) for row in auto} == {(f, m) for f in formats for m in SMALL.rows}
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] >= 10 + len(FORMATS)


@pytest.mark.usefixtures("kernels")
def test_the_same_seed_gives_the_same_report() -> None:
    first, second = run(), run()
    assert [row.error for row in first.rows] == [row.error for row in second.rows]
    other = check.run(0, seed=2, arithmetic="numpy")
    assert [row.error for row in first.rows] != [row.error for row in other.rows]


def test_the_default_covers_every_m_and_group_and_more_than_one_shape() -> None:
    for on_gpu in (False, True):
        for size in ("default", "full"):
            made = SCOPE_OF(size, on_gpu)
            assert made.rows == (1, 2, 7, 16, 33, 128, 1000)
            assert made.groups == (64, 128, 256)
            assert len(made.shapes) > 1
            for n, k in (*made.shapes, made.format_shape):
                assert n % 8 == 0
                assert k % 128 == 0
        assert len(SCOPE_OF("quick", on_gpu).shapes) == 1


def test_the_formats_are_all_that_are_promised() -> None:
    names = {(f.method, f.symmetric, f.act_order) for f in FORMATS}
    for method in ("gptq", "gptq_v2", "compressed-tensors"):
        for symmetric in (False, True):
            for act_order in (False, True):
                assert (method, symmetric, act_order) in names
    assert {("awq", False, False), ("awq", True, False)} <= names
    assert {f.bias for f in FORMATS} == {False, True}


def test_torchs_arithmetic_finds_the_same(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, whose memory the stand-in's kernels work on."""
    torch = pytest.importorskip("torch")

    class OnCpu(TorchArithmetic):
        stream = 0

        def __init__(self) -> None:
            self.name = "torch on the CPU"
            self._torch, self._device = torch, torch.device("cpu")

        def active(self) -> Any:
            return torch.no_grad()

    same = run()
    pack = packing.pack
    monkeypatch.setattr(check, "arithmetic_of", lambda *_: OnCpu())
    monkeypatch.setattr(packing, "pack", lambda *a, device=None, **k: pack(*a, **k))
    report = check.run(0, seed=1)
    assert not report.aborted, report.aborted
    assert report.failures == ()
    assert report.peer == "torch on the CPU"
    assert [row.test for row in report.rows] == [row.test for row in same.rows]
    for mine, other in zip(report.rows, same.rows, strict=True):
        if mine.part == "tactic" and mine.test == "product":
            assert mine.error == pytest.approx(other.error, rel=1e-3)
            assert mine.peer_error == pytest.approx(other.peer_error, rel=0.05)

    def skip(tactic: int, problem: Problem, out: Any, address: int) -> None:
        out[0, 0] = np.nan
        fake_kernels.memory(address + out.nbytes, 1, "float16")[0] = 1

    kernels.after = skip
    problems = {row.problem for row in check.run(0, seed=1).failures if row.part == "tactic"}
    assert problems == {"it wrote outside of its output or workspace"}


# ---- Limits ----


@pytest.mark.parametrize(
    ("kind", "op", "k", "limit"),
    [
        ("gemm", QuantOp.GROUP_SCALE_ZERO, 14336, 1.1),
        ("decode", QuantOp.GROUP_SCALE, 4096, 1.1),
        ("a kind of the future", QuantOp.PER_COLUMN, 4096, 1.1),
        ("gemv", QuantOp.GROUP_SCALE, 14336, 4.0),
        ("gemv", QuantOp.GROUP_SCALE_ZERO, 4096, 4.0),
        ("gemv", QuantOp.GROUP_SCALE_ZERO, 4160, 9.0),
    ],
)
def test_only_what_sums_in_half_precision_may_lose_more(
    kind: str, op: QuantOp, k: int, limit: float
) -> None:
    assert check.limit_of(replace(gemm(), kind=kind), op, k) == limit


# ---- What is wrong ----


def failures_of(report: check.Report) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in report.failures:
        found.setdefault(row.test, set()).add(re.sub(r"[\d.]+", "#", row.problem))
    return found


def test_an_error_beyond_the_limit_is_seen(kernels: FakeKernels) -> None:
    def worse(a: Any, q: Any, *others: Any) -> Any:
        exact = fake_kernels.product(a, q, *others)
        return (exact.astype(np.float64) * (1 + 2e-3)).astype(np.float16)

    kernels.product = worse
    report = run()
    assert not report.ok
    found = failures_of(report)
    assert "the error is # times the peer's, allowed is #" in found["product"]
    assert "# values are not those of the dequantised weight" in found["identity"]


def test_a_value_that_is_not_written_is_seen(kernels: FakeKernels) -> None:
    def skip(tactic: int, problem: Problem, out: Any, address: int) -> None:
        out.view(np.uint16)[-1, -1] = 0x7E7E

    kernels.after = skip
    assert any("NaNs, or values that were never written" in r.problem for r in run().failures)


@pytest.mark.parametrize("where", [-1, 0], ids=["before", "after"])
def test_a_write_outside_of_the_output_is_seen(
    kernels: FakeKernels, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(SMALL, formats=())  # whose outputs have no bands
    monkeypatch.setattr(check, "scope_of", lambda size, on_gpu: without)

    def outside(tactic: int, problem: Problem, out: Any, address: int) -> None:
        at = address - 2 if where < 0 else address + out.nbytes
        fake_kernels.memory(at, 1, "float16")[0] = 1

    kernels.after = outside
    rows = run().rows
    assert rows
    assert all("wrote outside" in row.problem for row in rows)


def test_a_result_that_differs_between_launches_is_seen(kernels: FakeKernels) -> None:
    def drift(tactic: int, problem: Problem, out: Any, address: int) -> None:
        if len(kernels.launches) % 2:
            out[0, 0] = np.nextafter(out[0, 0], np.float16(np.inf))

    kernels.after = drift
    report = run()
    assert any("1 values differ between two launches" in row.problem for row in report.failures)


def test_a_wrong_column_in_the_identity_is_seen(kernels: FakeKernels) -> None:
    def swap(tactic: int, problem: Problem, out: Any, address: int) -> None:
        if problem.m == problem.k:
            out[:, [0, 1]] = out[:, [1, 0]]

    kernels.after = swap
    failures = run().failures
    assert failures
    assert {row.test for row in failures} == {"identity"}


def test_packing_that_differs_between_gpu_and_cpu_is_seen(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LIBRARY.pack_device

    def wrong(source: Any, q: int, k: int, n: int, out: int, **options: Any) -> None:
        right(source, q, k, n, out, **options)
        fake_kernels.memory(out, 1, "uint8")[0] ^= 0x11

    monkeypatch.setattr(LIBRARY, "pack_device", wrong)
    packings = [row for row in run().rows if row.test == "packing"]
    assert {row.problem for row in packings} == {"packed is not the same from GPU and CPU"}


def test_a_launch_that_is_refused_is_a_failure_and_not_the_end(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LIBRARY.run

    def refuse(tactic: int, quant_op: int, m: int, *others: Any) -> None:
        if m == 7:
            raise ArgumentError("no")
        right(tactic, quant_op, m, *others)

    monkeypatch.setattr(LIBRARY, "run", refuse)
    report = run()
    assert {row.m for row in report.failures} == {7}
    assert any(row.problem == "the launch failed: no" for row in report.failures)
    assert any(row.problem == "the call failed: no" for row in report.failures)
    assert not report.aborted


def test_a_lost_gpu_ends_the_check_with_what_was_found(
    kernels: FakeKernels,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = LIBRARY.run

    def lost(*arguments: Any) -> None:
        if len(kernels.launches) >= 50:
            raise DeviceError("an illegal memory access")
        right(*arguments)

    monkeypatch.setattr(LIBRARY, "run", lost)
    report = run()
    assert not report.ok
    assert report.rows
    assert report.failures == ()
    assert re.search(
        r"the GPU failed: .*: product M = .*: an illegal memory access", report.aborted
    )
    assert len(kernels.launches) == 50
    check.show(report)
    assert "aborted: the GPU failed" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_checked() -> None:
    with pytest.raises(DeviceError):
        check.run(0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"size": "huge"}, "size is 'huge'"), ({"seed": -1}, "seed is -1"), ({"seed": 1.5}, "seed")],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        check.run(0, **arguments)


# ---- The report ----


@pytest.mark.usefixtures("kernels")
def test_a_report_is_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = run()
    values = json.loads(report.as_json())
    assert values["ok"] is True
    assert len(values["rows"]) == len(report.rows)
    row = next(row for row in values["rows"] if row["test"] == "product")
    assert row["ratio"] == pytest.approx(row["error"] / row["peer_error"])
    check.show(report)
    printed = capsys.readouterr().out
    assert gemm().name in printed
    for format in FORMATS:
        assert format.name in printed
    assert "all right" in printed
    assert "seed 1" in printed


def test_a_report_of_failures_names_each(
    kernels: FakeKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    def skip(tactic: int, problem: Problem, out: Any, address: int) -> None:
        out[0, 0] = np.nan

    kernels.after = skip
    report = run()
    values = json.loads(report.as_json())  # NaN is no JSON
    assert values["ok"] is False
    check.show(report)
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert f"failed: {gemm().name}: product M = 1, N = 64, K = 256, per_column" in printed
    assert "more: --json FILE has them all" in printed


# ---- What it compares with ----


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_checkpoints_are_what_packing_reads(format: check_formats.Format) -> None:
    made = checkpoint(format, 40, 256, np.random.default_rng(5))
    packed = packing.pack(made.tensors, config=made.config)
    unpacked: Any = packing.unpack(packed)
    assert np.array_equal(unpacked.q, made.q)
    assert np.array_equal(unpacked.scales, made.scales)
    assert (unpacked.z is None) == (made.zeros is None) == format.symmetric
    assert made.zeros is None or np.array_equal(unpacked.z, made.zeros)
    if format.act_order:
        assert np.array_equal(unpacked.g_idx, made.group_of_row)
    else:
        assert np.array_equal(made.group_of_row, np.arange(256) // GROUP)
    assert (unpacked.bias is None) == (made.bias is None) == (not format.bias)


def test_words_are_those_of_the_definitions() -> None:
    random = np.random.default_rng(3)
    values = random.integers(0, 16, (16, 24), np.uint8)
    for order in (tuple(range(8)), checkpoints.AWQ_ORDER):
        right = checkpoints.words(values, order)
        assert np.array_equal(check_formats.words(values, order), right)
    assert np.array_equal(check_formats.columns(values), checkpoints.words(values.T).T)


@pytest.mark.usefixtures("kernels")
def test_a_buffer_is_aligned_to_sixteen_bytes_and_no_more() -> None:
    math = NumpyArithmetic(0)
    with math.active():
        buffer = math.buffer()
        for size in (0, 2, 1000, 64):
            buffer.arm(size)
            assert buffer.address % 32 == 16
            assert buffer.intact() == 1.0
            outcome = buffer.take(1, size // 2)
            assert np.isnan(outcome.values).all()
            for at in (buffer.address - 2 * GUARD, buffer.address + size + 2 * GUARD - 2):
                buffer.arm(size)
                fake_kernels.memory(at, 1, "int16")[0] = 0
                assert buffer.intact() == 0.0


def test_torch_rounds_and_measures_as_numpy_does() -> None:
    torch = pytest.importorskip("torch")
    math = object.__new__(TorchArithmetic)  # on the CPU
    math._torch, math._device = torch, torch.device("cpu")
    random = np.random.default_rng(11)
    exact = np.concatenate([
        random.standard_normal(20000) * np.exp2(random.integers(-30, 17, 20000)),
        [0.0, -0.0, 2.0**-25, 2.0**-24 * 1.5, 65519.99, 65520.0, 1 + 2**-11, 1 + 2**-11 + 2**-40],
    ])  # fmt: skip
    with np.errstate(over="ignore"):
        right = exact.astype(np.float16)
    assert np.array_equal(math._rounded(torch.from_numpy(exact)).numpy(), right)
    q = random.integers(0, 16, (8, 4), np.uint8)
    scales, zeros = random.standard_normal((2, 2, 4)).astype(np.float16)
    groups = np.array([0, 1, 1, 0, 0, 1, 0, 1])
    numpy = NumpyArithmetic(0)
    ours, theirs = math.weight(q, scales, zeros, groups), numpy.weight(q, scales, zeros, groups)
    assert np.array_equal(ours.exact.numpy(), theirs.exact)
    assert np.array_equal(ours.half.numpy(), theirs.half)
    result = theirs.half + np.float16(0.01)
    error = math.error(torch.from_numpy(result), ours.exact)
    assert math.read([error, 1.0]) == pytest.approx([numpy.error(result, theirs.exact), 1.0])
    assert math.read([]) == []
