"""Who takes part: this library's tactics, and peers that run as they come."""

from __future__ import annotations

from benchmarks.suite.contenders.base import Contender


def peers() -> list[Contender]:
    """Every peer that this program knows, whether it is installed or not."""
    from benchmarks.suite.contenders.dense import Cublas
    from benchmarks.suite.contenders.gemlite import GemLite
    from benchmarks.suite.contenders.humming import Humming
    from benchmarks.suite.contenders.tinygemm import TinyGemm
    from benchmarks.suite.contenders.trtllm import TensorRtLlm

    return [Cublas(), TinyGemm(), Humming(), GemLite(), TensorRtLlm()]


#: The names of :func:`peers`, for the command line, which loads none of them.
PEERS = ("cublas", "tinygemm", "humming", "gemlite", "tensorrt_llm")
#: Those whose own tuning takes minutes: the short set leaves them out unless they are asked for.
SLOW = ("gemlite",)
