"""Environment variables that switch something off."""

from __future__ import annotations

_OFF = ("off", "0", "no", "false", "none")


def is_off(value: str) -> bool:
    """Whether a variable's value switches off what it is about."""
    return value.strip().lower() in _OFF
