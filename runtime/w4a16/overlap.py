"""Whether launches may start while the kernel before them in the stream still runs."""

from __future__ import annotations

import os

from w4a16.errors import ArgumentError
from w4a16.switches import is_off

ENVIRONMENT = "W4A16_OVERLAP"

#: Read in every launch.
enabled: bool = not is_off(os.environ.get(ENVIRONMENT, ""))


def set_overlap(on: bool) -> None:
    """Whether launches may overlap with the kernel before them (programmatic dependent launch).

    On at first, unless ``W4A16_OVERLAP`` is 0, off, no or false in the environment. The kernels for
    few rows then read a weight while the kernel before still runs, and wait for it before they read
    anything that it may have written. This package does so only with a weight that it has launched
    without overlap before, and whose tensors torch knows of no change to since. What torch does not
    see (``tensor.data`` written to, a CUDA graph that writes the weight and is replayed, another
    library's kernels writing through an address, arrays of other frameworks changed in place) needs
    a ``torch.cuda.synchronize()`` before the next call, or no overlap. Weights that are inference
    tensors, whose changes torch does not count, never overlap.

    Off, only the calls of :mod:`w4a16.fused` overlap still, and only their own kernels with each
    other.
    """
    global enabled
    if not isinstance(on, bool):
        raise ArgumentError(f"on is {on!r:.40}: expected True or False")
    enabled = on
