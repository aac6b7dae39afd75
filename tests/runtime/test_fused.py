"""Normalisation with projections without a GPU: fusing weights, the operators, errors, launches."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from w4a16 import fused, fused_ops, overlap, torch_ops
from w4a16.fused_weights import GPTQTensors
from w4a16.library import (
    LIBRARY,
    RUN_ONE_KERNEL,
    RUN_OVERLAP,
    Device,
    GptqArgs,
    Norm,
    NormQkvArgs,
    QuantOp,
)
from w4a16.tactics import Plan

from tests.runtime.checkpoints import Case, case_of, weight
from tests.runtime.host_kernels import memory

torch_ops.register_torch_ops()

#: Any: calls with arguments that are unpacked.
OPS: Any = fused_ops

K, GROUP = 256, 64
EPS = 1e-5


def case(n: int, seed: int = 1, **more: Any) -> Case:
    options = {"format": "gptq", "k": K, "group_size": GROUP, **more}
    rng = np.random.default_rng(seed)
    made = case_of(rng, n=n, **options)
    return replace(made, scales=np.exp2(rng.uniform(-9, -7, made.scales.shape)).astype(np.float16))


def tensors(made: Case) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in made.tensors().items()}


def fuse(*cases: Case, **options: Any) -> fused.FusedQKV:
    given = [tensors(made) for made in cases]
    return fused.fuse_qkv(*given, format="gptq", group_size=cases[0].group_size, **options)


def plain(made: Case, **options: Any) -> GPTQTensors:
    version: Any = "v1" if made.format == "gptq" else "v2"
    return GPTQTensors.of(tensors(made), group_size=made.group_size, zero_points=version, **options)


@pytest.fixture
def x() -> Any:
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5)).half()


@pytest.fixture
def ln() -> tuple[Any, Any]:
    source = torch.Generator().manual_seed(6)
    return torch.randn(K, generator=source).half(), torch.randn(K, generator=source).half()


def exact(norm: Norm, x: Any, ln: tuple[Any, Any], *cases: Case) -> list[Any]:
    """float64 [..., n] for each case."""
    wide = x.double()
    if norm is Norm.LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + EPS)
    wide = wide * ln[0].double() + ln[1].double()
    found = []
    for made in cases:
        product = wide @ torch.from_numpy(weight(made)).double()
        if made.bias is not None:
            product = product + torch.from_numpy(made.bias).double()
        found.append(product)
    return found


def close(found: Any, wanted: Any) -> None:
    norm = torch.linalg.vector_norm
    assert found.shape == wanted.shape
    assert found.dtype == torch.float16
    assert norm(found.double() - wanted) <= 1.5e-3 * norm(wanted)


CALLS: dict[Norm, Callable[..., Any]] = {
    Norm.LAYER: fused.layernorm_qkv,
    Norm.RMS: fused.rmsnorm_qkv,
}
KINDS: dict[str, dict[str, Any]] = {
    "zeros": {},
    "symmetric": {"symmetric": True},
    "per column": {"symmetric": True, "group_size": -1},
    "bias": {"bias": True},
    "act-order": {"act_order": "shuffled", "bias": True},
    "v2": {"format": "gptq_v2"},
}


# ---- Fusing ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_weight_is_its_projections_packed_one_after_the_other(kind: str) -> None:
    options = {**KINDS[kind], "act_order": "none"}
    cases = [case(n, seed, **options) for seed, n in enumerate((64, 24, 8))]
    found = fused.fuse_qkv(
        *(tensors(made) for made in cases),
        format=cases[0].format,
        group_size=cases[0].group_size,
    )
    alone = [
        w4a16.pack(tensors(made), format=made.format, group_size=made.group_size) for made in cases
    ]
    for segment, wanted in zip(found.segments, alone, strict=True):
        assert segment.arrays().keys() == wanted.arrays().keys()
        for name, array in wanted.arrays().items():
            assert torch.equal(getattr(segment, name), array), name
    assert found.widths == (64, 24, 8)
    assert torch.equal(found.joined[0], torch.cat([p.scales for p in alone], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_is_cut_into_projections(kind: str) -> None:
    made = case(96, **KINDS[kind])
    whole = w4a16.pack(tensors(made), format=made.format, group_size=made.group_size)
    for widths in (None, (48, 24, 24), (88, 8), (96,)):
        found = fused.fuse_qkv(whole, widths=widths)
        w = torch.cat([w4a16.dequantize(part) for part in found.segments], 1)
        assert torch.equal(w, w4a16.dequantize(whole))
        assert found.widths == (widths or (32, 32, 32))
        assert found.packed is whole.packed
        assert bool(found.joined) == (len(found.widths) > 1)


def test_a_projection_without_zeros_or_bias_beside_others_gets_zeros() -> None:
    cases = [case(16, 1, symmetric=True), case(16, 2, bias=True)]
    found = fuse(*cases)
    assert found.quant_op is QuantOp.GROUP_SCALE_ZERO
    assert not found.zeros[0].any()
    assert not found.bias[0].any()
    for segment, made in zip(found.segments, cases, strict=True):
        assert torch.equal(w4a16.dequantize(segment), torch.from_numpy(weight(made)))


def test_checkpoint_tensors_can_be_fused_later(x: Any) -> None:
    made = case(96)
    one, other = fused.fuse_qkv(plain(made)), fuse(made)
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.joined[1], other.joined[1])


def test_an_order_that_says_nothing_is_dropped() -> None:
    made = case(24)
    given = {**tensors(made), "g_idx": torch.arange(K) // GROUP}
    assert GPTQTensors.of(given, group_size=GROUP).g_idx is None
    given["g_idx"] = given["g_idx"].flip(0)
    order = GPTQTensors.of(given, group_size=GROUP).g_idx
    assert order is not None
    assert order.dtype == torch.int32
    given["g_idx"] = torch.empty(0, dtype=torch.int32)
    assert GPTQTensors.of(given, group_size=GROUP).g_idx is None


# ---- Calling ----


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("kind", KINDS)
def test_equal_widths_give_one_tensor(kind: str, norm: Norm, x: Any, ln: Any) -> None:
    made = case(96, **KINDS[kind])
    wanted = torch.stack(exact(norm, x, ln, made)[0].split(32, -1))
    for given in (
        fused.fuse_qkv(tensors(made), format=made.format, group_size=made.group_size),
        plain(made),
    ):
        found = CALLS[norm](x, given, *ln, EPS)
        close(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize("norm", list(Norm))
def test_other_widths_give_a_tensor_each(norm: Norm, x: Any, ln: Any) -> None:
    cases = [case(n, seed, bias=True) for seed, n in enumerate((64, 24, 16))]
    found = CALLS[norm](x, fuse(*cases), *ln, EPS)
    for one, wanted in zip(found, exact(norm, x, ln, *cases), strict=True):
        close(one, wanted)
        assert one.is_contiguous()
    assert found[1].data_ptr() == found[0].data_ptr() + found[0].nbytes


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions_are_kept(leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, K).half()
    assert fused.layernorm_qkv(x, fuse(case(96))).shape == (3, *leading, 32)
    found = fused.rmsnorm_qkv(x, fuse(case(16), case(8, 2)))
    assert [one.shape for one in found] == [(*leading, 16), (*leading, 8)]


def test_results_go_into_one_tensor_or_into_several(x: Any, ln: Any) -> None:
    for given in (fuse(case(96)), plain(case(96))):
        wanted = fused.layernorm_qkv(x, given, *ln)
        whole = torch.full_like(wanted, math.nan)
        version = whole._version
        assert fused.layernorm_qkv(x, given, *ln, out=whole) is whole
        assert torch.equal(whole, wanted)
        assert whole._version > version
        parts = [torch.full_like(one, math.nan) for one in wanted]
        assert fused.layernorm_qkv(x, given, *ln, out=parts) is parts
        assert torch.equal(torch.stack(parts), wanted)


def operator(given: Any, *, out: bool = False) -> tuple[Any, tuple[Any, ...]]:
    name, arguments, _ = fused_ops._request(Norm.LAYER, given, None, None)
    return getattr(torch.ops.w4a16, f"{name}{'_out' if out else ''}").default, arguments


@pytest.mark.parametrize("kind", ["packed", "unequal", "checkpoint"])
def test_opcheck_finds_nothing(kind: str, x: Any, ln: Any) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "packed": lambda: fuse(case(96, bias=True)),
        "unequal": lambda: fuse(case(16), case(8, 2)),
        "checkpoint": lambda: plain(case(96, act_order="shuffled")),
    }
    given = makers[kind]()
    op, arguments = operator(given)
    torch.library.opcheck(op, (x, *ln, EPS, *arguments))
    op, arguments = operator(given, out=True)
    out = [x.new_empty((*x.shape[:-1], n)) for n in given.widths]
    torch.library.opcheck(op, (x, ln[0], None, EPS, *arguments, out))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compilation_breaks_no_graph(dynamic: bool, x: Any, ln: Any) -> None:
    torch._dynamo.reset()
    equal, unequal, own = fuse(case(96)), fuse(case(16), case(8, 2)), plain(case(96, 3))

    def network(x: Any) -> Any:
        q, k, v = fused.layernorm_qkv(x.neg(), equal, *ln)
        one, other = fused.rmsnorm_qkv(x, unequal, ln[0])
        return q + k + v + fused.layernorm_qkv(x, own)[0], one * 2, other

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows in (x, x[:1]):
            for found, wanted in zip(compiled(rows), network(rows), strict=True):
                assert torch.equal(found, wanted)


def test_the_backward_pass_says_that_there_is_none(x: Any, ln: Any) -> None:
    weight_of_norm = torch.nn.Parameter(ln[0])
    found = fused.layernorm_qkv(x, fuse(case(96)), weight_of_norm)
    with pytest.raises(w4a16.W4A16Error, match="not differentiable"):
        found.sum().backward()
    with pytest.raises(w4a16.ArgumentError, match="ln_weight requires a gradient"):
        fused.layernorm_qkv(x, fuse(case(96)), weight_of_norm, out=torch.empty_like(found.detach()))


# ---- Errors ----


def test_zero_points_of_another_shape_are_named_with_the_right_one() -> None:
    given = {**tensors(case(96)), "qzeros": torch.zeros(4, 8, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"qzeros is int32 \[4, 8\].*expected int32 \[4, 12\]"):
        GPTQTensors.of(given, group_size=GROUP)
    with pytest.raises(ValueError, match=r"qzeros is int32 \[4, 8\].*expected int32 \[4, 12\]"):
        fused.fuse_qkv(given, format="gptq", group_size=GROUP)


ERRORS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "hidden": (
        lambda x, w: fused.layernorm_qkv(x[..., :128].contiguous(), w),
        r"x is float16 \[2, 3, 128\].*expected \[..., 256\]",
    ),
    "dtype": (lambda x, w: fused.layernorm_qkv(x.float(), w), "x is float32.*float16"),
    "numpy": (lambda x, w: fused.layernorm_qkv(x.numpy(), w), "x is a ndarray"),
    "weight": (lambda x, w: fused.layernorm_qkv(x, w.packed), "weight is a Tensor.*fuse_qkv"),
    "ln_weight": (
        lambda x, w: fused.rmsnorm_qkv(x, w, torch.ones(128).half()),
        r"ln_weight is float16 \[128\].*expected float16 \[256\]",
    ),
    "ln_bias": (
        lambda x, w: fused.layernorm_qkv(x, w, None, torch.ones(K)),
        r"ln_bias is float32 \[256\].*expected float16 \[256\]",
    ),
    "eps": (lambda x, w: fused.layernorm_qkv(x, w, eps=-1.0), "eps is -1.0"),
    "no eps": (lambda x, w: fused.layernorm_qkv(x, w, eps=None), "eps is None"),  # type: ignore[arg-type]
    "numpy ln": (lambda x, w: fused.layernorm_qkv(x, w, np.ones(K)), "ln_weight is a ndarray"),
    "joined": (lambda x, w: fused.rmsnorm_qkv(x, w, joined="x"), "joined is 'x'"),  # type: ignore[arg-type]
    "one kernel": (lambda x, w: fused.rmsnorm_qkv(x, w, one_kernel=None), "one_kernel is None"),  # type: ignore[arg-type]
    "no outs": (lambda x, w: fused.rmsnorm_qkv(x, w, out=3), "out is a int: expected 3 tensors"),
    "packed, joined": (
        lambda x, w: fused.layernorm_qkv(x, plain(case(96)), joined=False),
        "joined is False.*leave joined and one_kernel out",
    ),
    "tactic": (lambda x, w: fused.layernorm_qkv(x, w, tactic="none"), "tactic is 'none'"),
    "plain": (lambda x, w: fused.layernorm_qkv(x, w, tactic="gptq:plain"), "the weight is packed"),
    "packed": (
        lambda x, w: fused.layernorm_qkv(x, plain(case(96)), tactic=0),
        "tactic is 0.*gptq:plain",
    ),
    "out": (
        lambda x, w: fused.layernorm_qkv(x, w, out=torch.empty(3, 2, 3, 16).half()),
        r"out\[0\] is float16 \[2, 3, 16\].*expected float16 \[2, 3, 32\]",
    ),
    "outs": (lambda x, w: fused.layernorm_qkv(x, w, out=[x]), "out is 1 tensors: expected 3"),
    "sum": (
        lambda x, w: fuse(case(96), widths=(32, 32, 16)),
        r"widths is \[32, 32, 16\] \(sum 80\).*96 outputs",
    ),
    "thirds": (lambda x, w: fuse(case(64)), r"64 outputs.*expected widths="),
    "narrow": (lambda x, w: fuse(case(96), widths=(84, 12)), "q projection has 84 outputs"),
    "many": (lambda x, w: fuse(*[case(8)] * 4), "4 weights"),
    "inputs": (lambda x, w: fuse(case(8), case(8, k=512)), "256 inputs, the k projection 512"),
    "order": (
        lambda x, w: fuse(case(8, act_order="shuffled"), case(8, 2, act_order="shuffled")),
        "q and k projections have their rows in different orders",
    ),
    "float": (
        lambda x, w: GPTQTensors(
            **{**tensors(case(24)), "scales": torch.ones(4, 24)}, group_size=GROUP
        ),
        "scales is float32.*float16",
    ),
    "unit": (lambda x, w: plain(case(24, group_size=48, k=240)), "multiples of 32"),
    "config": (
        lambda x, w: GPTQTensors.of({**tensors(case(24)), "weight": x}),
        "'weight' is no tensor of a GPTQ weight",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_one_clear_error(name: str, x: Any) -> None:
    call, text = ERRORS[name]
    with pytest.raises(w4a16.ArgumentError, match=text):
        call(x, fuse(case(96)))


# ---- Launches, on host memory ----


class HostLaunches:
    """What the library does with the arguments of a launch, by numpy."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def workspace(self, args: NormQkvArgs) -> int:
        if args.flags & RUN_ONE_KERNEL:
            return 0
        LIBRARY.check_norm_qkv(args)
        return 1024

    def normalize(self, norm: int, *given: Any, flags: int = 0) -> None:
        x, m, stride, hidden, weight_, bias, eps, columns, k, out, stream = given
        self.seen.append({"norm": norm, "flags": flags, "stream": stream})
        memory(out, (m, k), np.float16)[...] = self.rows(
            *(norm, x, m, stride, hidden, weight_, bias, eps, columns, k)
        )

    def rows(
        self,
        norm: int,
        x: int,
        m: int,
        stride: int,
        hidden: int,
        weight_: Any,
        bias: Any,
        eps: Any,
        columns: Any,
        k: int,
    ) -> Any:
        flat = memory(x, ((m - 1) * stride + hidden,), np.float16)
        wide = np.stack([flat[i * stride : i * stride + hidden] for i in range(m)]).astype(float)
        if norm == Norm.LAYER:
            wide = wide - wide.mean(1, keepdims=True)
        wide = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + eps)
        if weight_:
            wide = wide * memory(weight_, (hidden,), np.float16)
        if bias:
            wide = wide + memory(bias, (hidden,), np.float16)
        at = memory(columns, (k,), np.int32) if columns else np.arange(k)
        return np.where(at < 0, 0, wide[:, np.maximum(at, 0)]).astype(np.float16)

    def norm_qkv(self, args: NormQkvArgs, stream: int) -> None:
        widths = [int(n) for n in args.n if n]
        split = [int(n) for n in args.split if n]
        self.seen.append(
            {
                "flags": int(args.flags) & RUN_OVERLAP,
                "form": int(args.flags) & ~RUN_OVERLAP,
                "stream": stream,
                "tactics": list(args.tactic)[: len(widths)],
                "widths": widths,
                "split": split,
            }
        )
        m, k = int(args.m), int(args.k)
        y = self.rows(
            *(args.norm, args.x, m, args.x_stride, args.hidden, args.ln_weight, args.ln_bias),
            *(args.eps, args.columns, k),
        ).astype(float)
        begin, products = 0, []
        for i, n in enumerate(widths):
            q = np.empty((k, n // 2), np.uint8)
            LIBRARY.unpack(args.b + begin * k // 2, k, n, q.ctypes.data)
            begin += n
            groups = k // args.group_size if args.group_size else 1
            values = np.stack([q & 15, q >> 4], -1).reshape(k, n).astype(float) - 8
            w = values * memory(args.scales[i], (groups, n), np.float16).repeat(k // groups, 0)
            if args.zeros[i]:
                w += memory(args.zeros[i], (groups, n), np.float16).repeat(k // groups, 0)
            product = y @ w
            products.append(
                product + memory(args.bias[i], (n,), np.float16) if args.bias[i] else product
            )
        if split:
            products = np.split(products[0], np.cumsum(split)[:-1], 1)
        for i, product in enumerate(products):
            assert args.c[i] % 16 == 0
            memory(args.c[i], product.shape, np.float16)[...] = product

    def gptq_linear(self, args: GptqArgs, stream: int) -> None:
        self.seen.append({"flags": int(args.flags), "stream": stream})
        m, k, widths = int(args.m), int(args.k), [int(n) for n in args.n if n]
        n, groups = sum(widths), -(-k // args.group_size)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        packed = memory(args.qweight, (k // 8, n), np.uint32)
        q = (packed[:, None, :] >> shifts[:, None] & 15).reshape(k, n).astype(float)
        stored = memory(args.qzeros, (groups, n // 8), np.uint32)
        stored = stored + np.uint32(0x11111111 * args.zero_offset)
        zeros = (stored[:, :, None] >> shifts & 15).reshape(groups, n)
        order = np.arange(k) // args.group_size
        if args.g_idx:
            order = memory(args.g_idx, (k,), np.int32)
        w = (q - zeros[order]) * memory(args.scales, (groups, n), np.float16)[order]
        product = memory(args.a, (m, k), np.float16).astype(float) @ w
        if args.bias:
            product += memory(args.bias, (n,), np.float16)
        for i, part in enumerate(np.split(product, np.cumsum(widths)[:-1], 1)):
            memory(args.c[i], part.shape, np.float16)[...] = part


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostLaunches:
    """The CUDA implementation, which knows no better than that the CPU is GPU number -1."""
    made = HostLaunches()
    monkeypatch.setattr(torch_ops, "_current_device", lambda: -1)
    monkeypatch.setattr(torch_ops, "_raw_stream", lambda device: 4711)
    monkeypatch.setattr(
        torch_ops,
        "_empty_cuda",
        lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
    )
    monkeypatch.setattr(torch_ops, "_capturing", lambda: False)
    monkeypatch.setattr(fused_ops, "plan", lambda *problem: Plan(problem[3] % 7 % 2, 0))
    found = Device(
        device=0, cc_major=9, cc_minor=0, sm_count=132, driver_version=13000, name="H", problem=""
    )
    monkeypatch.setattr(LIBRARY, "device", lambda device=-1: found)
    monkeypatch.setattr(LIBRARY, "norm_qkv_workspace", made.workspace)
    monkeypatch.setattr(LIBRARY, "norm_qkv", made.norm_qkv)
    monkeypatch.setattr(LIBRARY, "normalize_rows", made.normalize)
    monkeypatch.setattr(LIBRARY, "gptq_linear", made.gptq_linear)
    fused_ops._few_tiles.cache_clear()
    return made


@pytest.mark.parametrize("join", [-1, 0, 1])
@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_computes_what_the_reference_does(
    kind: str, norm: Norm, join: int, host: HostLaunches, x: Any, ln: Any
) -> None:
    made = case(96, **KINDS[kind])
    given = fused.fuse_qkv(
        tensors(made), format=made.format, group_size=made.group_size, widths=(48, 32, 16)
    )
    _, arguments = operator(given)
    found = OPS._qkv_cuda(norm, x, *ln, EPS, *arguments, 0, join)
    wanted = exact(norm, x, ln, made)[0].split([48, 32, 16], -1)
    for one, other in zip(
        fused_ops.segments(found, x.shape[:-1], given.widths), wanted, strict=True
    ):
        close(one, other)
    (launch,) = host.seen
    assert launch["stream"] == 4711
    assert launch["widths"] == ([48, 32, 16] if join == 0 else [96])
    assert launch["split"] == ([] if join == 0 else [48, 32, 16])


def test_the_library_chooses_the_tactic_where_its_kernel_is_to_normalise(
    host: HostLaunches, ln: Any
) -> None:
    _, arguments = operator(fuse(case(96)))
    planned = 96 % 7 % 2

    def form(m: int, *options: int) -> tuple[int, list[int]]:
        OPS._qkv_cuda(Norm.LAYER, torch.randn(m, K).half(), *ln, EPS, *arguments, *options)
        return host.seen[-1]["form"], host.seen[-1]["tactics"]

    assert form(4) == (0, [planned])
    assert form(4, -1, -1, True) == (RUN_ONE_KERNEL, [-1])
    assert form(4, 0, -1, True) == (RUN_ONE_KERNEL, [0])
    assert form(4, 0) == (0, [0])


@pytest.mark.parametrize("kind", ["zeros", "bias", "act-order", "v2"])
def test_a_checkpoint_is_launched_as_it_is(kind: str, host: HostLaunches, x: Any, ln: Any) -> None:
    made = case(96, **KINDS[kind])
    _, arguments = operator(plain(made))
    found = OPS._gptq_cuda(Norm.RMS, x, *ln, EPS, *arguments)
    close(found, torch.stack(exact(Norm.RMS, x, ln, made)[0].split(32, -1)))
    assert [launch["flags"] for launch in host.seen] == [0, RUN_OVERLAP]


def test_rows_may_lie_apart_or_in_any_order(host: HostLaunches, ln: Any) -> None:
    made = case(96)
    _, arguments = operator(fuse(made))
    for x in (torch.randn(4, K + 8).half()[:, :K], torch.randn(K, 4).half().T):
        found = OPS._qkv_cuda(Norm.LAYER, x, *ln, EPS, *arguments)
        close(found, torch.stack(exact(Norm.LAYER, x, ln, made)[0].split(32, -1)))


def test_outputs_off_an_aligned_address_are_copied(host: HostLaunches, x: Any, ln: Any) -> None:
    made = case(96)
    _, arguments = operator(fuse(made))
    storage = torch.full((3 * 6 * 32 + 1,), math.nan).half()
    out = list(storage[1:].view(3, 2, 3, 32))
    OPS._qkv_out_cuda(Norm.LAYER, x, *ln, EPS, *arguments, out)
    close(torch.stack(out), torch.stack(exact(Norm.LAYER, x, ln, made)[0].split(32, -1)))


def test_a_launch_overlaps_once_the_same_weight_was_launched_without(
    host: HostLaunches, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = fuse(case(96))
    _, arguments = operator(given)

    def flags() -> int:
        OPS._qkv_cuda(Norm.LAYER, x, None, None, EPS, *arguments)
        return int(host.seen[-1]["flags"])

    monkeypatch.setattr(torch_ops, "_capturing", lambda: True)
    assert [flags(), flags()] == [0, 0]
    monkeypatch.setattr(torch_ops, "_capturing", lambda: False)
    assert [flags(), flags(), flags()] == [0, RUN_OVERLAP, RUN_OVERLAP]
    given.scales[1].mul_(2)
    assert [flags(), flags()] == [0, RUN_OVERLAP]


def launch(host: HostLaunches, x: Any, given: Any, arguments: Any) -> int:
    """The flags of the call's first launch."""
    before = len(host.seen)
    called = OPS._gptq_cuda if isinstance(given, GPTQTensors) else OPS._qkv_cuda
    called(Norm.LAYER, x, None, None, EPS, *arguments)
    return int(host.seen[before]["flags"])


WEIGHTS: dict[str, Callable[..., Any]] = {"packed": fuse, "a checkpoint's": plain}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nothing_overlaps_with_the_kernel_before_where_that_is_off(
    kind: str, host: HostLaunches, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "enabled", True)
    given = WEIGHTS[kind](case(96))
    _, arguments = operator(given)
    w4a16.set_overlap(False)
    assert [launch(host, x, given, arguments) for _ in range(2)] == [0, 0]
    w4a16.set_overlap(True)
    assert [launch(host, x, given, arguments) for _ in range(2)] == [0, RUN_OVERLAP]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_another_tensor_at_the_same_address_is_another_weight(
    kind: str, host: HostLaunches, x: Any
) -> None:
    given = WEIGHTS[kind](case(96))
    arguments = list(operator(given)[1])
    assert [launch(host, x, given, arguments) for _ in range(2)] == [0, RUN_OVERLAP]
    scales = arguments[1]
    # Its changes are counted apart from those of the tensor that it shares memory with.
    arguments[1] = scales.data if isinstance(scales, torch.Tensor) else [t.data for t in scales]
    assert [launch(host, x, given, arguments) for _ in range(2)] == [0, RUN_OVERLAP]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_launch_leaves_a_weight_that_can_be_copied_and_saved(
    kind: str, host: HostLaunches, x: Any
) -> None:
    given = WEIGHTS[kind](case(96))
    _, arguments = operator(given)
    launch(host, x, given, arguments)
    file = io.BytesIO()
    torch.save(arguments[0], file)
    file.seek(0)
    for values in (copy.deepcopy(arguments[0]), torch.load(file, weights_only=True)):
        assert not values.__dict__.get("_w4a16_fused")
        assert torch.equal(values, arguments[0])
        again = [launch(host, x, given, [values, *arguments[1:]]) for _ in range(2)]
        assert again == [0, RUN_OVERLAP]


def test_a_launch_keeps_no_weight_alive(host: HostLaunches, x: Any) -> None:
    for make in WEIGHTS.values():
        given = make(case(96))
        _, arguments = operator(given)
        launch(host, x, given, arguments)
        gc.disable()
        try:
            values = weakref.ref(arguments[0])
            del arguments, given
            assert values() is None
        finally:
            gc.enable()


def test_without_rows_nothing_is_launched(host: HostLaunches) -> None:
    _, arguments = operator(fuse(case(96)))
    x = torch.empty(2, 0, K).half()
    assert OPS._qkv_cuda(Norm.LAYER, x, None, None, EPS, *arguments).shape == (3, 2, 0, 32)
    _, arguments = operator(plain(case(96)))
    assert OPS._gptq_cuda(Norm.LAYER, x, None, None, EPS, *arguments).shape == (3, 2, 0, 32)
    assert not host.seen


def test_projections_are_joined_where_they_have_few_tiles_or_need_no_copy(
    host: HostLaunches,
) -> None:
    weight, _ = operator(fuse(case(96)))
    gemm = next(tactic.index for tactic in LIBRARY.tactics if tactic.kind == "gemm")

    def joins(m: int, *widths: int, tactic: int = gemm) -> bool:
        packed: Any = weight
        return fused_ops._joins(0, m, widths, packed, tactic)

    assert joins(1, 4096, 4096, 4096)
    assert joins(512, 4096, 4096, 4096)
    assert joins(1024, 4096, 1024, 1024)
    assert not joins(2048, 4096, 1024, 1024)
    assert not joins(1024, 4096, 4096, 4096)
    decode = next(tactic.index for tactic in LIBRARY.tactics if tactic.kind == "decode")
    assert joins(2048, 4096, 1024, 1024, tactic=decode)


@pytest.mark.parametrize("tactic", [999, -7])
@pytest.mark.parametrize("m", [1, 100_000])
def test_a_tactic_that_there_is_not_is_refused_before_a_launch(
    m: int, tactic: int, host: HostLaunches
) -> None:
    _, arguments = operator(fuse(case(96)))
    with pytest.raises(w4a16.ArgumentError, match=f"tactic index is {tactic}|tactic is {tactic}"):
        OPS._qkv_cuda(Norm.LAYER, torch.zeros(m, K).half(), None, None, EPS, *arguments, tactic)
    assert not host.seen
