# SPDX-License-Identifier: Apache-2.0
"""The miniature upstream: a small TensorRT-LLM and CUTLASS, written out as git repositories."""

from .writer import Shape, Upstream, write_upstream

__all__ = ["Shape", "Upstream", "write_upstream"]
