"""`w4a16.fused` on a GPU: numbers, graphs, streams, memory, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import w4a16
from w4a16 import fused
from w4a16.fused_weights import GPTQTensors
from w4a16.library import LIBRARY, Norm

from tests.gpu.runtime.products import poison, torch
from tests.runtime.checkpoints import Case, case_of, exact_weight

K = 1024
EPS = 1e-5
#: Of the error of torch's FP16 norm and matmul. Upstream's GEMV, which few rows may take, and
#: sums of four products of the kernel for checkpoints lose more.
LIMITS = {"gemm": 1.05, "decode": 1.05, "gemv": 8.0, "gptq:plain": 1.75}
CALLS: dict[Norm, Callable[..., Any]] = {
    Norm.LAYER: fused.layernorm_qkv,
    Norm.RMS: fused.rmsnorm_qkv,
}
KINDS: dict[str, dict[str, Any]] = {
    "zeros": {},
    "v2 and group 64": {"format": "gptq_v2", "group_size": 64},
    "symmetric": {"symmetric": True},
    "per column": {"symmetric": True, "group_size": -1},
    "act-order": {"act_order": "shuffled", "bias": True},
    "bias": {"bias": True},
}
WIDTHS = ((256, 256, 256), (512, 128, 128))


class Fused:
    """A weight, packed and as its checkpoint has it, with its numbers."""

    def __init__(
        self, kind: str = "zeros", widths: tuple[int, ...] = WIDTHS[0], k: int = K
    ) -> None:
        options = {"format": "gptq", "k": k, "group_size": 128, **KINDS[kind]}
        rng = np.random.default_rng(len(kind) + sum(widths))
        made = case_of(rng, n=sum(widths), **options)
        scales = np.exp2(rng.uniform(-9, -7, made.scales.shape)).astype(np.float16)
        self.case: Case = replace(made, scales=scales)
        self.widths = widths
        self.k = k
        given = {name: torch.from_numpy(a).cuda() for name, a in self.case.tensors().items()}
        size = self.case.group_size
        version: Any = "v1" if self.case.format == "gptq" else "v2"
        self.packed = fused.fuse_qkv(given, format=self.case.format, group_size=size, widths=widths)
        self.plain = GPTQTensors.of(given, group_size=size, zero_points=version, widths=widths)
        self.exact_w = torch.from_numpy(exact_weight(self.case)).cuda()
        self.w = self.exact_w.half()
        source = torch.Generator("cuda").manual_seed(9)
        self.ln = [torch.randn(k, generator=source, device="cuda").half() for _ in "wb"]

    def x(self, *leading: int, seed: int = 2) -> Any:
        source = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(*leading, self.k, generator=source, device="cuda").half()

    def check(self, norm: Norm, found: Any, x: Any, limit: float) -> None:
        """Waits for the GPU."""
        wide = x.double()
        if norm is Norm.LAYER:
            wide = wide - wide.mean(-1, keepdim=True)
            theirs = torch.nn.functional.layer_norm(x, (self.k,), *self.ln, EPS)
        else:
            theirs = torch.nn.functional.rms_norm(x, (self.k,), self.ln[0], EPS) + self.ln[1]
        wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + EPS)
        exact = (wide * self.ln[0].double() + self.ln[1].double()) @ self.exact_w
        theirs = theirs @ self.w
        if self.case.bias is not None:
            bias = torch.from_numpy(self.case.bias).cuda()
            exact, theirs = exact + bias.double(), theirs + bias
        whole = torch.cat(list(found), -1).double()
        error = torch.linalg.vector_norm
        ratio = (error(whole - exact) / error(theirs.double() - exact)).item()
        assert ratio <= limit, f"{ratio:.3f} x torch's error"


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Fused:
    return Fused(request.param)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("m", [1, 2, 5, 16, 40, 128, 600])
def test_the_call_is_right_for_packed_weights_and_for_checkpoints(
    made: Fused, m: int, norm: Norm
) -> None:
    x = made.x(m)
    poison()
    gemv = any(tactic.kind == "gemv" for tactic in LIBRARY.tactics) and m < 16
    for joined in (None, False, True):
        found = CALLS[norm](x, made.packed, *made.ln, EPS, joined=joined)
        made.check(norm, found, x, LIMITS["gemv" if gemv else "gemm"])
    found = CALLS[norm](x, made.plain, *made.ln, EPS, tactic="gptq:plain")
    made.check(norm, found, x, LIMITS["gptq:plain"])


@pytest.mark.parametrize("leading", [(0,), (5,), (2, 0, 3), (2, 7)])
def test_leading_dimensions_widths_and_outputs_are_kept(leading: tuple[int, ...]) -> None:
    for widths in WIDTHS:
        product = Fused("bias", widths)
        x = product.x(*leading)
        for given in (product.packed, product.plain):
            found = fused.layernorm_qkv(x, given, *product.ln)
            assert [one.shape for one in found] == [(*leading, n) for n in widths]
            out = [torch.full_like(one, math.nan) for one in found]
            fused.layernorm_qkv(x, given, *product.ln, out=out)
            assert all(torch.equal(a, b) for a, b in zip(out, found, strict=True))
            odd = [
                torch.full((one.numel() + 1,), math.nan, device="cuda").half()[1:].view(one.shape)
                for one in found
            ]
            fused.layernorm_qkv(x, given, *product.ln, out=odd)
            assert all(torch.equal(a, b) for a, b in zip(odd, found, strict=True))


def test_strides_and_alignment_of_x_do_not_matter(made: Fused) -> None:
    wide = torch.randn(6, made.k + 24, device="cuda").half()
    storage = torch.randn(6 * made.k + 3, device="cuda").half()
    for x in (
        wide[:, : made.k],
        wide[::2, 5 : made.k + 5],
        wide[:, : made.k].T.contiguous().T,
        storage[3:].view(6, made.k),
        wide[0, : made.k].expand(4, made.k),
    ):
        for given in (made.packed, made.plain):
            found = fused.layernorm_qkv(x, given, *made.ln)
            wanted = fused.layernorm_qkv(x.contiguous().clone(), given, *made.ln)
            assert torch.equal(found, wanted)


def test_the_same_bits_come_every_time(made: Fused) -> None:
    for m in (1, 9, 100):
        x = made.x(m)
        for given in (made.packed, made.plain):
            first = fused.layernorm_qkv(x, given, *made.ln)
            for _ in range(10):
                assert torch.equal(fused.layernorm_qkv(x, given, *made.ln), first)


@pytest.mark.parametrize("m", [1, 33])
def test_a_captured_call_is_replayed_on_new_inputs(made: Fused, m: int) -> None:
    for given in (made.packed, made.plain):
        x = made.x(m)
        fused.layernorm_qkv(x, given, *made.ln)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fused.layernorm_qkv(x * 1, given, *made.ln)
            again = fused.layernorm_qkv(found[0].repeat(1, 4), given, *made.ln)
        for seed in range(3, 6):
            x.copy_(made.x(m, seed=seed))
            graph.replay()
            wanted = fused.layernorm_qkv(x, given, *made.ln)
            assert torch.equal(found, wanted)
            hidden = wanted[0].repeat(1, 4)
            assert torch.equal(again, fused.layernorm_qkv(hidden, given, *made.ln))


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("m", [1, 8])
def test_one_kernel_is_right_and_says_where_it_cannot(m: int, norm: Norm) -> None:
    made = Fused("zeros")
    x = made.x(m)
    try:
        found = CALLS[norm](x, made.packed, *made.ln, EPS, one_kernel=True)
    except w4a16.UnsupportedError as error:
        pytest.skip(str(error))
    made.check(norm, found, x, LIMITS["decode"])
    with pytest.raises(w4a16.UnsupportedError, match="by itself"):
        CALLS[norm](made.x(17), made.packed, *made.ln, EPS, one_kernel=True)
    with pytest.raises(w4a16.ArgumentError, match="one_kernel is True"):
        CALLS[norm](x, made.plain, *made.ln, EPS, one_kernel=True)


def test_a_weight_that_changes_is_read_anew() -> None:
    product = Fused("zeros")
    x = product.x(4)
    for given in (product.packed, product.plain):
        scales = [given.scales] if isinstance(given, GPTQTensors) else list(given.scales)
        if not isinstance(given, GPTQTensors):
            scales.append(given.joined[0])
            scales += [*given.zeros, given.joined[1]]
        before = [fused.layernorm_qkv(x, given, *product.ln) for _ in range(3)][-1]
        for _ in range(5):
            for tensor in scales:
                tensor.mul_(2)
            double = fused.layernorm_qkv(x, given, *product.ln)
            for tensor in scales:
                tensor.div_(2)
            after = fused.layernorm_qkv(x, given, *product.ln)
            assert torch.equal(after, before)
            assert torch.equal(double, before * 2)


def test_nothing_waits_for_the_gpu(made: Fused) -> None:
    x = made.x(16)
    for given in (made.packed, made.plain):
        fused.layernorm_qkv(x, given, *made.ln)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused.layernorm_qkv(x, given, *made.ln)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        event = torch.cuda.Event()
        torch.cuda._sleep(200_000_000)
        fused.layernorm_qkv(x, given, *made.ln)
        event.record()
        assert not event.query()
        torch.cuda.synchronize()


def test_work_is_ordered_on_the_current_stream(made: Fused) -> None:
    x = made.x(16)
    for given in (made.packed, made.plain):
        expected = fused.layernorm_qkv(x, given, *made.ln)
        torch.cuda.synchronize()
        results = []
        for stream in [torch.cuda.Stream() for _ in range(3)]:
            with torch.cuda.stream(stream):
                late = torch.full_like(x, torch.nan)
                torch.cuda._sleep(20_000_000)
                late.copy_(x)
                results.append(fused.layernorm_qkv(late, given, *made.ln))
        torch.cuda.synchronize()
        assert all(torch.equal(found, expected) for found in results)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compilation_breaks_no_graph(mode: str) -> None:
    torch._dynamo.reset()
    product = Fused("act-order", WIDTHS[1])

    def network(x: Any) -> Any:
        q, k, v = fused.layernorm_qkv(x * 0.5, product.packed, *product.ln)
        return (
            torch.cat([q, k, v], -1) + fused.rmsnorm_qkv(x, product.plain, product.ln[0])[0][:, :1]
        )

    compiled = torch.compile(network, mode=mode, fullgraph=True)
    with torch.no_grad():
        for m in (1, 64, 64, 64):
            x = product.x(m, seed=m)
            found = compiled(x).clone()
            expected = network(x)
            norm = torch.linalg.vector_norm
            assert norm((found - expected).double()) <= 2e-3 * norm(expected.double())


def test_opcheck_finds_nothing(made: Fused) -> None:
    from w4a16 import fused_ops

    for given in (made.packed, made.plain):
        name, arguments, _ = fused_ops._request(Norm.LAYER, given, None, None)
        op = getattr(torch.ops.w4a16, name).default
        torch.library.opcheck(op, (made.x(3), *made.ln, EPS, *arguments))


def test_arrays_on_several_devices_are_refused(made: Fused) -> None:
    with pytest.raises(w4a16.ArgumentError, match="one device"):
        fused.layernorm_qkv(made.x(2).cpu(), made.packed, *made.ln)
    with pytest.raises(w4a16.ArgumentError, match=r"ln_weight is .* on cpu"):
        fused.layernorm_qkv(made.x(2), made.packed, made.ln[0].cpu())
