"""A library and a GPU timer that are not there: tactics with a made-up, known time for anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from w4a16.errors import UnsupportedError
from w4a16.library import Device, Problem, QuantOp, Tactic
from w4a16.tables import Case, Key

EVERY_OP = frozenset(QuantOp)


def gemm(index: int, tile_n: int, tile_m: int, cluster: str = "1x1x1") -> Tactic:
    return Tactic(
        index=index,
        name=f"sm90:{tile_n}x{tile_m}x64:{cluster}",
        kind="gemm",
        schedule="pingpong" if tile_n == 64 else "cooperative",
        tile=(tile_n, tile_m, 64),
        cluster=tuple(int(part) for part in cluster.split("x")),
        m_min=1,
        m_max=2**31 - 1,
        quant_ops=EVERY_OP,
        group_multiple=64,
        groups=(),
        uses_workspace=tile_n == 128,
    )


def gemv(index: int) -> Tactic:
    return replace(
        gemm(index, 0, 0),
        name="gemv",
        kind="gemv",
        schedule="cuda-core",
        m_max=15,
        group_multiple=0,
        groups=(64, 128),
        uses_workspace=False,
    )


def decode(index: int, rows: int, tokens: int) -> Tactic:
    return replace(
        gemm(index, rows, tokens),
        name=f"decode:{rows}x{tokens}",
        kind="decode",
        schedule="mma",
        tile=(rows, tokens, 256),
        m_max=65535 * tokens,
        group_multiple=0,
        groups=(32, 64, 128, 256),
        uses_workspace=False,
    )


TACTICS = (
    *(gemm(0, 64, 16), gemm(1, 64, 64), gemm(2, 128, 16), gemm(3, 128, 64), gemm(4, 128, 128)),
    *(gemm(5, 128, 256), gemm(6, 128, 256, "2x1x1"), gemv(7)),
)
GPU = Device(
    device=0,
    cc_major=9,
    cc_minor=0,
    sm_count=132,
    driver_version=13000,
    name="NVIDIA Fake",
    problem="",
)


class FakeLibrary:
    """What the modules under test ask of ``LIBRARY``."""

    def __init__(self, tactics: Sequence[Tactic] = TACTICS, device: Device = GPU) -> None:
        self.tactics = tuple(tactics)
        self.tactic_index = {tactic.name: tactic.index for tactic in tactics}
        self.gpu = device
        self.path = Path(__file__)
        self.build = SimpleNamespace(
            bundle_digest="d" * 64,
            compiler="nvcc",
            compress="size",
            cuda_runtime_version=13000,
            version="1.0.0",
            release="v1.0.0",
        )
        self.asked = 0

    def device(self, ordinal: int = -1) -> Device:
        return replace(self.gpu, device=max(ordinal, 0))

    def check_device(self, ordinal: int = -1) -> None:
        pass

    def why_unsupported(self, tactic: int, problem: Problem) -> str:
        self.asked += 1
        if problem.n % 8 or problem.k % 64:
            return "N is a multiple of 8 and K of 64"
        known = self.tactics[max(tactic, 0)]
        if tactic >= 0 and known.kind == "gemv":
            if problem.m > known.m_max:
                return "too many rows"
            if problem.group_size not in (0, *known.groups):
                return "no such group size"
        if tactic >= 0 and known.kind == "gemm" and problem.group_size % 64:
            return "groups are multiples of 64"
        return ""

    def auto_tactic(self, problem: Problem) -> int:
        kind = "decode" if problem.group_size % 64 else "gemm"
        for tactic in self.tactics:
            if tactic.kind == kind:
                reason = self.why_unsupported(tactic.index, problem)
                if reason:
                    raise UnsupportedError(reason)
                return tactic.index
        raise UnsupportedError("no GEMM")

    def workspace_size(self, tactic: int, problem: Problem) -> int:
        return 1000 * tactic + problem.m


def true_us(tactic: Tactic, case: Case, m: int) -> float:
    """A made-up time: a GEMV that grows with M, GEMMs that fill tiles."""
    size = case.n * case.k / 2**20
    if tactic.kind == "gemv":
        return 3 + size * 0.1 * m
    tile_n, tile_m = tactic.tile[:2]
    if tactic.kind == "decode":
        return (2 + size * 0.1) * -(-m // tile_m)
    cluster = tactic.cluster[0]
    tiles = -(-case.n // tile_n) * -(-m // tile_m)
    work = tiles * tile_n * tile_m * case.k / 2**20
    return 12 + 0.01 * cluster + size * 0.2 + work * (0.001 + 0.1 / tile_m) * 0.5


class FakeTimer:
    """Times by :func:`true_us`, with a little noise, and less of it where timed properly."""

    made: FakeTimer

    def __init__(self, device: int = 0, *, library: FakeLibrary, seed: int = 1) -> None:
        self.library = library
        self.random = random.Random(seed)
        self.calls: list[tuple[int, tuple[int, ...], bool]] = []
        self.broken: set[str] = set()
        self.small = 0
        FakeTimer.made = self

    def __enter__(self) -> FakeTimer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, case: Case, has_bias: bool = False) -> None:
        self.case = case

    def why_not(self, m: int) -> str:
        return f"M = {m}: too little memory" if self.small and m > self.small else ""

    def time(self, tactics: Sequence[int], m: int, *, quick: bool) -> dict[int, float]:
        self.calls.append((m, tuple(tactics), quick))
        noise = 0.03 if quick else 0.002
        return {
            t: true_us(self.library.tactics[t], self.case, m)
            * self.random.uniform(1 - noise, 1 + noise)
            for t in tactics
        }

    def wrong(self, tactic: int, m: int) -> str:
        return "nonsense" if self.library.tactics[tactic].name in self.broken else ""

    def latency(self, tactic: int, m: int, calls: int = 50) -> tuple[float, float]:
        return 3.0, 20.0


def key(**changes: Any) -> Key:
    values: dict[str, Any] = {
        "gpu": "NVIDIA Fake",
        "sm": "9.0",
        "sm_count": 132,
        "driver": 13000,
        "cuda_runtime": 13000,
        "library": "abc",
    }
    return Key(**{**values, **changes})
