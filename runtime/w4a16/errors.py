"""What can go wrong, as exceptions: each says what was found, and what would be right."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """``w4a16_status`` of ``w4a16.h``."""

    OK = 0
    INVALID_ARGUMENT = 1
    MISALIGNED = 2
    UNSUPPORTED = 3
    UNKNOWN_TACTIC = 4
    WORKSPACE = 5
    NO_DEVICE = 6
    OLD_DRIVER = 7
    WRONG_DEVICE = 8
    CUDA = 9
    OUT_OF_MEMORY = 10
    INTERNAL = 11


class W4A16Error(Exception):
    """Base of all errors of this package."""


class ArgumentError(W4A16Error, ValueError):
    """An argument cannot be used: its type, shape, dtype, device, layout or value."""


class UnsupportedError(ArgumentError):
    """The arguments make sense, but no kernel takes them."""


class FormatError(ArgumentError):
    """A checkpoint, a configuration or a file is not what its format says."""


class DeviceError(W4A16Error):
    """No GPU, one that the library was not built for, an old driver, or an error of CUDA's."""


class OutOfMemoryError(W4A16Error, MemoryError):
    """Host memory ran out."""


class InternalError(W4A16Error):
    """The library refused its own arguments: a bug."""


class W4A16Warning(UserWarning):
    """Input that is usable, but probably not what was meant."""


_FAMILIES: dict[Status, type[W4A16Error]] = {
    Status.INVALID_ARGUMENT: ArgumentError,
    Status.MISALIGNED: ArgumentError,
    Status.UNSUPPORTED: UnsupportedError,
    Status.UNKNOWN_TACTIC: ArgumentError,
    Status.WORKSPACE: ArgumentError,
    Status.NO_DEVICE: DeviceError,
    Status.OLD_DRIVER: DeviceError,
    Status.WRONG_DEVICE: DeviceError,
    Status.CUDA: DeviceError,
    Status.OUT_OF_MEMORY: OutOfMemoryError,
    Status.INTERNAL: InternalError,
}


def from_status(status: int, message: str) -> W4A16Error:
    """The exception for a status of the C library."""
    try:
        family = _FAMILIES[Status(status)]
    except (KeyError, ValueError):
        return InternalError(f"status {status}: {message}")
    return family(message)
