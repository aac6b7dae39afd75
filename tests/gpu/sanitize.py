"""One small launch of every tactic and quant op, and of all that packs weights and picks columns.

Buffers have exactly the size that they need.

    python tests/gpu/sanitize.py
    python tests/gpu/sanitize.py --only decode --depth 8256
    python tests/gpu/sanitize.py --only stream --rows 6000
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py

Without torch, which is slow and noisy under compute-sanitizer; with numpy, if there is one, the
results are checked as well. Outputs are filled with NaN first; workspaces are left as they come,
but for what decode kernels look at before they have written it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import os
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.cuda import Cuda, CudaError
from tests.gpu.library import (
    AUTO,
    RUN_ONE_KERNEL,
    RUN_OVERLAP,
    ApiError,
    Args,
    GptqArgs,
    Library,
    LibraryNotFoundError,
    NormQkvArgs,
    Problem,
    QuantOp,
    Source,
    Status,
    Tactic,
    find_library,
    pack_args,
    problem,
)

# Neither is a multiple of a tile; K is deep enough for stream-K to split it (--depth: another one).
N, K, GROUP = 296, 1088, 64
# Decode kernels hold up to 24 stages of 256 of K: with this they fill some of them twice.
DEEP = 8256
GEMM_ROWS = (5, 70)
GEMV_ROWS = (1, 6, 15)
DECODE_ROWS: tuple[int, ...] = (1, 6, 70)
# With this, kernels that stream have more tiles than CTAs.
MANY_ROWS = 6000
# Of one launch of those, on any GPU of this architecture.
MOST_CTAS = 512
NAN = b"\x5a\x7e"
EXIT_WRONG, EXIT_CANNOT_RUN = 1, 77


def halves(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


@dataclass
class Operands:
    """One weight matrix and its activations on the device, and their host bytes."""

    cuda: Cuda
    quant_op: QuantOp
    group: int
    plain: bytes
    a: bytes
    scales: bytes
    zeros: bytes | None
    bias: bytes
    exact_weights: Any = None
    """[K, N] in float64, made by :func:`error_of` when first needed."""

    @classmethod
    def make(cls, cuda: Cuda, quant_op: QuantOp, group: int, draw: random.Random) -> Operands:
        count = N if quant_op is QuantOp.PER_COLUMN else K // group * N
        zeros = None
        if quant_op is QuantOp.GROUP_SCALE_ZERO:
            zeros = halves([draw.uniform(-0.05, 0.05) for _ in range(count)])
        return cls(
            cuda=cuda,
            quant_op=quant_op,
            group=group,
            plain=draw.randbytes(K * N // 2),
            a=halves([draw.gauss(0, 1) for _ in range(max(*GEMM_ROWS, *DECODE_ROWS) * K)]),
            scales=halves([draw.uniform(0.001, 0.01) for _ in range(count)]),
            zeros=zeros,
            bias=halves([draw.gauss(0, 1) for _ in range(N)]),
        )

    def packed(self, library: Library) -> bytes:
        out = ctypes.create_string_buffer(library.packed_size(None, K, N))
        source = ctypes.create_string_buffer(self.plain, len(self.plain))
        library.pack(None, ctypes.addressof(source), K, N, ctypes.addressof(out), 1)
        return out.raw


@dataclass(frozen=True)
class Launch:
    tactic: Tactic
    given: Problem
    operands: Operands

    def __str__(self) -> str:
        bias = " bias" if self.given.has_bias else ""
        op = QuantOp(self.given.quant_op).label
        group = self.given.group_size
        return f"{self.tactic.name} {op} M={self.given.m} N={N} K={K} g={group}{bias}"


class Buffers:
    """Device memory for one launch, given back when it is over."""

    def __init__(self, cuda: Cuda, library: Library, launch: Launch) -> None:
        self._cuda = cuda
        self._owned: list[int] = []
        operands, given = launch.operands, launch.given
        self.c_bytes = int(given.m) * N * 2
        self.c = self._upload(NAN * (self.c_bytes // 2))
        size = library.workspace_size(launch.tactic.index, given)
        workspace = self._workspace(launch.tactic, size) if size else None
        self.args = Args(
            problem=ctypes.pointer(given),
            a=self._upload(operands.a[: given.m * K * 2]),
            b=self._upload(operands.packed(library)),
            scales=self._upload(operands.scales),
            zeros=None if operands.zeros is None else self._upload(operands.zeros),
            bias=self._upload(operands.bias) if given.has_bias else None,
            c=self.c,
            workspace=workspace,
            workspace_bytes=size,
        )

    def _workspace(self, tactic: Tactic, size: int) -> int:
        """As it comes, but where a decode tactic looks for tickets: it reads them before it knows
        that they were written, and takes anything but this very launch's for none.
        """
        address = self._cuda.allocate(size)
        self._owned.append(address)
        if tactic.is_decode:
            tickets = MOST_CTAS * (tactic.tile[0] // 16) * 8
            self._cuda.write(address, NAN * (min(tickets, size) // 2))
        return address

    def _upload(self, data: bytes) -> int:
        address = self._cuda.upload(data)
        self._owned.append(address)
        return address

    def poison(self) -> None:
        self._cuda.write(self.c, NAN * (self.c_bytes // 2))

    def result(self) -> bytes:
        return self._cuda.download(self.c, self.c_bytes)

    def free(self) -> None:
        for address in self._owned:
            self._cuda.free(address)


def launches(library: Library, cuda: Cuda, only: str, seed: int) -> Iterator[Launch]:
    draw = random.Random(seed)
    turn = 0
    for op in QuantOp:
        for group in (0,) if op is QuantOp.PER_COLUMN else (GROUP // 2, GROUP, K):
            operands = Operands.make(cuda, op, group or K, draw)
            for tactic in library.tactics:
                if not re.search(only, tactic.name):
                    continue
                for m in rows_of(tactic, group):
                    turn += 1
                    given = problem(op, m, N, K, group, bool(turn % 2))
                    if library.status_of_supports(tactic.index, given) is Status.OK:
                        yield Launch(tactic, given, operands)


def rows_of(tactic: Tactic, group: int) -> tuple[int, ...]:
    if tactic.is_decode:
        return DECODE_ROWS
    if tactic.is_gemv:
        return GEMV_ROWS
    # The whole of K as one group is a question for the GEMM's host code alone.
    return GEMM_ROWS if group != K else GEMM_ROWS[:1]


class Helper:
    """One launch of what is no product, in its own buffers, with the bytes that must come out."""

    def __init__(self, cuda: Cuda, name: str, wanted: bytes) -> None:
        self.name = name
        self.wanted = wanted
        self._cuda = cuda
        self._owned: list[int] = []
        self.out = self.upload(b"")
        self.start: Callable[[int], None] = lambda stream: None

    def upload(self, data: bytes) -> int:
        """An empty ``data`` stands for the poisoned output."""
        address = self._cuda.upload(data or self._poison)
        self._owned.append(address)
        return address

    @property
    def _poison(self) -> bytes:
        # Nothing that it may write, wherever it is compared.
        return bytes(byte ^ 0xFF for byte in self.wanted)

    def poison(self) -> None:
        self._cuda.write(self.out, self._poison)

    def untouched(self) -> bool:
        return self.result() == self._poison

    def result(self) -> bytes:
        return self._cuda.download(self.out, len(self.wanted))

    def free(self) -> None:
        for address in self._owned:
            self._cuda.free(address)


def helpers(library: Library, cuda: Cuda, seed: int) -> Iterator[Helper]:
    """Each must be freed by whoever takes it."""
    draw = random.Random(seed)
    yield from _packings(library, cuda, draw)
    yield from _gathers(library, cuda, draw)
    yield from _norms(library, cuda, draw)
    yield from _projections(library, cuda, draw)
    yield from _checkpoints(library, cuda, draw)


def _packings(library: Library, cuda: Cuda, draw: random.Random) -> Iterator[Helper]:
    for source in Source:
        for arch in (None, "sm_80"):
            for given in ((K, N), (K - 24, N - 16)):
                q = draw.randbytes(given[0] * given[1] // 2)
                if source is Source.BYTES:
                    q = bytes(value & 15 for value in q + q)
                for picked in (False, True):
                    rows = [draw.randrange(-1, given[0]) for _ in range(K)] if picked else []
                    indices = struct.pack(f"<{len(rows)}i", *rows)
                    out = ctypes.create_string_buffer(K * N // 2)
                    here = [ctypes.create_string_buffer(data, len(data)) for data in (q, indices)]
                    where = [ctypes.addressof(data) for data in (*here, out)]
                    args = pack_args(
                        source, arch, (K, N), given, where[0], where[1] if rows else None, where[2]
                    )
                    library.pack_weight(args)
                    name = f"pack {source.label} {arch} {given}{' rows' if rows else ''}"
                    helper = Helper(cuda, name, out.raw)
                    there = pack_args(
                        source,
                        arch,
                        (K, N),
                        given,
                        helper.upload(q),
                        helper.upload(indices) if rows else None,
                        helper.out,
                    )
                    helper.start = partial(library.pack_weight_device, there)
                    yield helper
                if source is Source.PLAIN and given == (K, N):
                    packed = ctypes.create_string_buffer(K * N // 2)
                    library.pack(arch, where[0], K, N, ctypes.addressof(packed))
                    helper = Helper(cuda, f"unpack {arch}", q)
                    address = helper.upload(packed.raw)
                    helper.start = partial(library.unpack_device, arch, address, K, N, helper.out)
                    yield helper


def _gathers(library: Library, cuda: Cuda, draw: random.Random) -> Iterator[Helper]:
    k_in = 1001
    for m in (1, 5, 70):
        for stride in (k_in, 1008):
            x = draw.randbytes(2 * ((m - 1) * stride + k_in))
            for picked in (True, False):
                k_out = 1088 if picked else 1024
                at = list(range(k_out))
                if picked:
                    at = [draw.randrange(-1, k_in + 1) for _ in range(k_out)]
                rows = (x[2 * row * stride :][: 2 * k_in] for row in range(m))
                wanted = b"".join(
                    row[2 * j : 2 * j + 2] if 0 <= j < k_in else b"\0\0" for row in rows for j in at
                )
                name = f"gather [{m}, {k_in}] stride {stride}{' columns' if picked else ''}"
                helper = Helper(cuda, name, wanted)
                columns = helper.upload(struct.pack(f"<{k_out}i", *at)) if picked else None
                here = helper.upload(x)
                helper.start = partial(
                    library.gather_columns, here, m, stride, k_in, columns, k_out, helper.out
                )
                yield helper


def _norms(library: Library, cuda: Cuda, draw: random.Random) -> Iterator[Helper]:
    """Constant rows, of which only the bias is left."""
    for m, hidden, stride, k in (
        (1, 1001, 1001, 1088),
        (3, 1088, 1096, 1088),
        (300, 5120, 5120, 5120),
    ):
        bias = halves([float(draw.randrange(-99, 99)) for _ in range(hidden)])
        x = b"".join(halves([float(row % 100)] * stride) for row in range(m))
        for picked in (False, True):
            at = list(range(k))
            if picked:
                draw.shuffle(at)
            row = b"".join(bias[2 * j : 2 * j + 2] if j < hidden else b"\0\0" for j in at)
            name = f"norm [{m}, {hidden}] stride {stride}{' columns' if picked else ''}"
            helper = Helper(cuda, name, row * m)
            columns = helper.upload(struct.pack(f"<{k}i", *at)) if picked else None
            here = helper.upload(x[: 2 * ((m - 1) * stride + hidden)])
            last = helper.upload(bias)
            helper.start = partial(
                library.normalize_rows,
                *(0, here, m, stride, hidden, None, last, 1e-5, columns, k, helper.out, 0),
            )
            yield helper


def _projections(library: Library, cuda: Cuda, draw: random.Random) -> Iterator[Helper]:
    """Of constant rows a one is left, at one place: the product is a row of the weight."""
    widths = (136, 88, 72)
    one = 2 * K // 3
    plain = draw.randbytes(K * N // 2)
    row = [plain[one * N // 2 + j // 2] >> 4 * (j % 2) & 15 for j in range(N)]
    out = ctypes.create_string_buffer(K * N // 2)
    source = ctypes.create_string_buffer(plain, len(plain))
    library.pack(None, ctypes.addressof(source), K, N, ctypes.addressof(out))
    values = [(q - 8) / 64 for q in row]
    calls = [(m, 0) for m in (1, 2, 5, 12, 70)] + [(m, RUN_ONE_KERNEL) for m in (1, 2)]
    for (m, form), joined in itertools.product(calls, (False, True)):
        wanted, first = b"", 0
        for width in widths:
            wanted += halves(values[first : first + width]) * m
            first += width
        name = f"norm and {'one' if joined else 3} projections M={m} flags={form}"
        helper = Helper(cuda, name, wanted)
        parts = (N,) if joined else widths
        args = NormQkvArgs(
            flags=form,
            quant_op=int(QuantOp.GROUP_SCALE),
            m=m,
            hidden=K,
            k=K,
            group_size=GROUP,
            x_stride=K,
            eps=1e-5,
            x=helper.upload(halves([3.0] * (m * K))),
            ln_bias=helper.upload(halves([float(i == one) for i in range(K)])),
            b=helper.upload(out.raw),
        )
        begin = 0
        for i, width in enumerate(widths):
            args.split[i] = width if joined else 0
            args.c[i] = helper.out + 2 * m * begin
            begin += width
        for i, n in enumerate(parts):
            args.n[i] = n
            args.tactic[i] = AUTO
            args.scales[i] = helper.upload(halves([1 / 64] * (K // GROUP * n)))
        if form and library.raw("norm_qkv_supports", ctypes.byref(args)) != Status.OK:
            continue  # no kernel of this library normalises
        size = library.norm_qkv_workspace(args)
        args.workspace, args.workspace_bytes = helper.upload(bytes(size)), size
        helper.start = partial(library.norm_qkv, args)
        yield helper


def _checkpoints(library: Library, cuda: Cuda, draw: random.Random) -> Iterator[Helper]:
    """Small integers, whose products are exact."""
    k, n, group = 320, 40, 64
    for m in (1, 2, 3, 9):
        for ordered in (True, False):
            q = [[draw.randrange(16) for _ in range(n)] for _ in range(k)]
            zeros = [[draw.randrange(16) for _ in range(n)] for _ in range(k // group)]
            groups = [row // group for row in range(k)]
            if not ordered:
                draw.shuffle(groups)
            a = [[draw.randrange(-2, 3) for _ in range(k)] for _ in range(m)]
            sums = [
                [
                    sum(a[i][r] * (q[r][j] - zeros[groups[r]][j]) for r in range(k)) / 64
                    for j in range(n)
                ]
                for i in range(m)
            ]
            first = halves([value for line in sums for value in line[:24]])
            last = halves([value for line in sums for value in line[24:]])
            name = f"gptq M={m}{'' if ordered else ' act-order'}"
            helper = Helper(cuda, name, first + last)
            qweight = [
                sum(q[8 * r + i][j] << 4 * i for i in range(8))
                for r in range(k // 8)
                for j in range(n)
            ]
            qzeros = [
                sum(line[8 * c + i] << 4 * i for i in range(8))
                for line in zeros
                for c in range(n // 8)
            ]
            args = GptqArgs(
                m=m,
                k=k,
                group_size=group,
                a=helper.upload(halves([float(value) for line in a for value in line])),
                qweight=helper.upload(struct.pack(f"<{len(qweight)}I", *qweight)),
                qzeros=helper.upload(struct.pack(f"<{len(qzeros)}I", *qzeros)),
                scales=helper.upload(halves([1 / 64] * (k // group * n))),
                g_idx=None if ordered else helper.upload(struct.pack(f"<{k}i", *groups)),
            )
            args.n[0], args.n[1] = 24, 16
            args.c[0], args.c[1] = helper.out, helper.out + len(first)
            helper.start = partial(library.gptq_linear, args)
            yield helper


def error_of(launch: Launch, result: bytes) -> float | None:
    """Relative Frobenius error against float64; None without numpy."""
    try:
        np: Any = importlib.import_module("numpy")
    except ImportError:
        return None
    operands, m = launch.operands, int(launch.given.m)

    def matrix(data: bytes, rows: int) -> Any:
        return np.frombuffer(data, np.float16).astype(np.float64).reshape(rows, -1)

    if operands.exact_weights is None:
        data = np.frombuffer(operands.plain, np.uint8).reshape(K, N // 2)
        q = np.stack([data & 15, data >> 4], axis=-1).reshape(K, N).astype(np.float64)
        groups = len(operands.scales) // 2 // N
        w = (q - 8) * matrix(operands.scales, groups).repeat(K // groups, axis=0)
        if operands.zeros is not None:
            w += matrix(operands.zeros, groups).repeat(K // groups, axis=0)
        operands.exact_weights = w.astype(np.float16).astype(np.float64)
    exact = matrix(operands.a[: m * K * 2], m) @ operands.exact_weights
    if launch.given.has_bias:
        exact += matrix(operands.bias, 1)
    found = matrix(result, m)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="tactics whose name matches")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("W4A16_SEED") or 1))
    parser.add_argument(
        "--depth", type=int, default=K, metavar="K", help=f"of the products; {DEEP} for decode"
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="M",
        help=f"of decode tactics; {MANY_ROWS} for those that stream",
    )
    options = parser.parse_args()
    globals()["K"] = options.depth
    if options.rows is not None:
        globals()["DECODE_ROWS"] = (options.rows,)
    try:
        library = Library(find_library())
        device = library.check_device()
        cuda = Cuda()
    except (LibraryNotFoundError, ApiError, CudaError, OSError) as reason:
        print(f"cannot run: {reason}", file=sys.stderr)
        return EXIT_CANNOT_RUN
    print(f"{library.path} {library.version} on {device.name.decode()}, seed {options.seed}")
    start, count, wrong = time.monotonic(), 0, 0
    for launch in launches(library, cuda, options.only, options.seed):
        print(launch, end=" ", flush=True)
        buffers = Buffers(cuda, library, launch)
        library.run(launch.tactic.index, buffers.args)
        cuda.synchronize()
        result = buffers.result()
        if launch.tactic.is_decode:
            # The first of these may overlap with no kernel, the second with the first.
            buffers.poison()
            buffers.args.flags = RUN_OVERLAP
            for _ in range(2):
                library.run(launch.tactic.index, buffers.args)
            cuda.synchronize()
            changed = buffers.result() != result
        else:
            changed = False
        buffers.free()
        error = error_of(launch, result)
        # Upstream's GEMV sums in FP16; a wrong layout or a missed element gives far more.
        bad = error is not None and not error < (2e-3 if launch.tactic.is_gemv else 4e-4)
        bad = bad or changed
        said = "ran" if error is None else f"error {error:.2e}"
        print(f"{said}{' CHANGES' if changed else ''}{' WRONG' if bad else ''}")
        count += 1
        wrong += bad
    for helper in helpers(library, cuda, options.seed):
        if re.search(options.only, helper.name):
            helper.start(0)
            cuda.synchronize()
            bad = helper.result() != helper.wanted
            print(f"{helper.name} {'WRONG' if bad else 'right'}")
            count += 1
            wrong += bad
        helper.free()
    print(f"{count} launches, {wrong} wrong, {time.monotonic() - start:.1f} s")
    return EXIT_WRONG if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
