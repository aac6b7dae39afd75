# SPDX-License-Identifier: Apache-2.0
"""Checks the miniature's packing and GEMM on the CPU, with no GPU and no nvcc.

    python -m tests.upstream.check CUDA_INCLUDE SHIM_INCLUDE

The folders hold the CUDA toolkit's headers and the stand-ins for cublasLt.h and the like.
"""

import random
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CPP = HERE / "trtllm/cpp"
PERMUTATION = {
    4: [
        *(0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27),
        *(4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31),
    ],
    8: [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
}
WORD_ORDER = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}
Matrix = list[list[int]]


def build(includes: list[str], program: Path) -> None:
    common = CPP / "tensorrt_llm/common"
    folders = [
        *(CPP, CPP / "include", CPP / "tensorrt_llm/cutlass_extensions/include"),
        *(HERE / "cutlass/include", *includes),
    ]
    sources = [HERE / "host_check.cpp"]
    sources.append(CPP / "tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp")
    names = ("assert", "envUtils", "logger", "stringUtils", "tllmException")
    sources += [common / f"{name}.cpp" for name in names]
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-o", str(program), *map(str, sources)]
    subprocess.run([*command, *(f"-I{folder}" for folder in folders)], check=True)


def run(program: Path, *arguments: object, data: bytes) -> bytes:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def to_bytes(values: list[int], bits: int) -> bytes:
    if bits == 8:
        return bytes(value & 255 for value in values)
    pairs = zip(values[::2], values[1::2], strict=True)
    return bytes(low & 15 | (high & 15) << 4 for low, high in pairs)


def packed(weights: Matrix, bits: int, interleave: int) -> bytes:
    """The steps as they are documented, on signed weights [k][n]."""
    k = len(weights)
    order = PERMUTATION[bits]
    tile = len(order)
    rows = [weights[i - i % tile + order[i % tile]] for i in range(k)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    flat = [
        value
        for first in range(0, len(columns), interleave)
        for start in range(0, k, 64 if interleave > 1 else k)
        for column in columns[first : first + interleave]
        for value in column[start : start + (64 if interleave > 1 else k)]
    ]
    stored = [value + (1 << (bits - 1)) for value in flat]
    words = WORD_ORDER[bits]
    size = len(words)
    return to_bytes([stored[i - i % size + words[i % size]] for i in range(len(stored))], bits)


def halves(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 2}e", data))


def check_packing(program: Path, draw: random.Random) -> None:
    for bits, arch, k, n in [
        *((4, arch, k, n) for arch in (80, 89, 90, 100, 120) for k, n in ((64, 64), (192, 128))),
        *((8, arch, 128, 96) for arch in (80, 90)),
    ]:
        half = 1 << (bits - 1)
        weights = [[draw.randrange(-half, half) for _ in range(n)] for _ in range(k)]
        plain = [value for row in weights for value in row]
        interleave = 1 if arch == 90 else 16 // bits
        result = run(program, "pack", bits, arch, k, n, data=to_bytes(plain, bits))
        assert result == packed(weights, bits, interleave), (bits, arch, k, n)
        again = run(program, "unpack", bits, interleave, k, n, data=result)
        assert list(again) == [value + half for value in plain], (bits, arch, k, n)


def check_gemm(program: Path, draw: random.Random) -> None:
    n, k = 72, 192
    for what, m, group in [("scale", 1, k), ("scale", 17, 64), ("zeros", 5, 64), ("zeros", 3, 128)]:
        rows = -(-k // group)
        weights = [[draw.randrange(-8, 8) for _ in range(n)] for _ in range(k)]
        a, scales, zeros, bias = (
            floats(halves([draw.uniform(-1, 1) * size for _ in range(count)]))
            for count, size in ((m * k, 1), (rows * n, 0.1), (rows * n, 0.5), (n, 1))
        )
        data = halves(a) + packed(weights, 4, 1) + halves(scales) + halves(zeros) + halves(bias)
        result = floats(run(program, what, m, n, k, group, data=data))
        for i, value in enumerate(result):
            row, column = divmod(i, n)
            at = [(j // group) * n + column for j in range(k)]
            exact = [
                weights[j][column] * scales[at[j]] + (zeros[at[j]] if what == "zeros" else 0.0)
                for j in range(k)
            ]
            terms = [a[row * k + j] * w for j, w in enumerate(floats(halves(exact)))]
            wanted = sum(terms) + bias[column]
            assert abs(value - wanted) <= 1e-3 * (1 + abs(wanted)), (what, m, group, row, column)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "host_check"
        build(sys.argv[1:], program)
        check_packing(program, random.Random(1))
        check_gemm(program, random.Random(2))
    print("packing and GEMM of the miniature are right")


if __name__ == "__main__":
    main()
