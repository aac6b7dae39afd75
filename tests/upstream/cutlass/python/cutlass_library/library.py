# SPDX-License-Identifier: Apache-2.0
"""Types, schedules and kinds of GEMM, each with the C++ it stands for."""

import enum
from enum import auto as enum_auto

__all__ = [
    "DataType",
    "DataTypeNames",
    "DataTypeSize",
    "DataTypeTag",
    "EpilogueScheduleTag",
    "EpilogueScheduleType",
    "GemmKind",
    "GemmKindNames",
    "KernelScheduleTag",
    "KernelScheduleType",
    "enum_auto",
]


class DataType(enum.Enum):
    u4 = enum_auto()
    u8 = enum_auto()
    f16 = enum_auto()
    bf16 = enum_auto()
    e4m3 = enum_auto()


DataTypeNames = {kind: kind.name for kind in DataType}

DataTypeSize = {
    DataType.u4: 4,
    DataType.u8: 8,
    DataType.f16: 16,
    DataType.bf16: 16,
    DataType.e4m3: 8,
}

DataTypeTag = {
    DataType.u4: "cutlass::uint4b_t",
    DataType.u8: "uint8_t",
    DataType.f16: "cutlass::half_t",
    DataType.bf16: "cutlass::bfloat16_t",
    DataType.e4m3: "cutlass::float_e4m3_t",
}


class GemmKind(enum.Enum):
    Gemm = enum_auto()
    Grouped = enum_auto()


GemmKindNames = {GemmKind.Gemm: "gemm", GemmKind.Grouped: "gemm_grouped"}


class KernelScheduleType(enum.Enum):
    TmaWarpSpecializedPingpong = enum_auto()
    TmaWarpSpecializedCooperative = enum_auto()


KernelScheduleTag = {kind: f"cutlass::gemm::Kernel{kind.name}" for kind in KernelScheduleType}


class EpilogueScheduleType(enum.Enum):
    TmaWarpSpecialized = enum_auto()
    TmaWarpSpecializedCooperative = enum_auto()
    NoSmemWarpSpecialized = enum_auto()


EpilogueScheduleTag = {kind: f"cutlass::epilogue::{kind.name}" for kind in EpilogueScheduleType}
