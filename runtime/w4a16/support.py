"""Whether the library has a kernel for a weight, whatever the number of activations."""

from __future__ import annotations

from w4a16.errors import UnsupportedError
from w4a16.library import AUTO, LIBRARY, Problem, QuantOp

# A kernel may be for few rows of activations only, or for many.
_SOME_ROWS = (128, 1, 16)


def require_kernel(
    n: int,
    k: int,
    groups: int,
    *,
    zeros: bool,
    bias: bool,
    described: str,
) -> None:
    """Raises :class:`w4a16.UnsupportedError` unless some kernel takes such a weight, with the way
    out; ``described`` says whose it is, in the words of whoever has it."""
    if zeros:
        op, group = QuantOp.GROUP_SCALE_ZERO, k // groups
    elif groups == 1:
        op, group = QuantOp.PER_COLUMN, 0
    else:
        op, group = QuantOp.GROUP_SCALE, k // groups
    reason = ""
    for m in _SOME_ROWS:
        problem = Problem(quant_op=op, m=m, n=n, k=k, group_size=group, has_bias=bias)
        found = LIBRARY.why_unsupported(AUTO, problem)
        if not found:
            return
        reason = reason or found
    raise UnsupportedError(
        f"no kernel takes a weight with {described} ({reason}): quantise the model again with"
        " groups of 64 or 128 inputs, or with one scale a column (-1)"
    )
