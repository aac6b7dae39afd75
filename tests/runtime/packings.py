"""What the tests of packing share: random weights, and what they must become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import w4a16
from w4a16.library import LIBRARY

from tests.gpu.layouts import packed_by_steps
from tests.runtime.checkpoints import Case, case_of, expected

Array = Any
#: Any: arrays that may be None are looked at where they are known not to be.
api: Any = w4a16

#: TensorRT-LLM before 0.16 had another layout for Hopper, and the library packs what it reads.
OLD = re.match(r"v?0\.(\d+)", LIBRARY.build.release)
SIGNED = OLD is not None and int(OLD[1]) < 16

V1 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
V2 = {**V1, "checkpoint_format": "gptq_v2"}


def pack(case: Case, **options: Any) -> Any:
    positional, named = case.arguments()
    return api.pack(*positional, **{**named, **options})


def random_case(seed: int = 1, **options: Any) -> Case:
    chosen = {"format": "gptq", "k": 256, "n": 24, "group_size": 128, **options}
    return case_of(np.random.default_rng(seed), **chosen)


def converted(case: Case, convert: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``pack``, with arrays of another framework."""

    def arrays_of(named: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: convert(value) if isinstance(value, np.ndarray) else value
            for name, value in named.items()
        }

    positional, named = case.arguments()
    return tuple(arrays_of(given) for given in positional), arrays_of(named)


def check_packed(packed: Any, case: Case) -> None:
    want = expected(case)
    k, n = want.q.shape
    assert (packed.in_features, packed.out_features) == (case.k, case.n)
    assert (packed.k, packed.n) == (k, n)
    assert packed.packed.dtype == np.uint8
    reference = packed_by_steps(want.q.astype(np.uint8), interleaved=False, signed_columns=SIGNED)
    assert (packed.packed.reshape(-1) == reference).all()
    pairs = (
        (packed.scales, want.scales),
        (packed.zeros, want.zeros),
        (packed.columns, want.columns),
        (packed.bias, want.bias),
    )
    for have, wanted in pairs:
        assert (have is None) == (wanted is None)
        if have is not None:
            assert have.dtype == wanted.dtype
            assert have.tobytes() == wanted.tobytes()
    for array in packed.arrays().values():
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.ctypes.data % 16 == 0
