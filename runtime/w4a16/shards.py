"""Which tensors of a checkpoint go into which file of the converted one."""

from __future__ import annotations

from dataclasses import dataclass, field

from w4a16.checkpoint import Checkpoint, Layer
from w4a16.errors import FormatError
from w4a16.safetensors import alignment_order, header_bound, nbytes_of

METADATA = {"format": "pt"}


@dataclass(kw_only=True)
class Shard:
    """A file to write."""

    number: int
    name: str = ""
    layers: list[Layer] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    expected: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    """Name, dtype and shape of all tensors that it may have."""
    tensor_bytes: int = 0
    """Of them; at least of those that it will have."""
    source_bytes: int = 0
    reserve: int = 0
    """For its header."""


def plan(checkpoint: Checkpoint, shard_bytes: int) -> list[Shard]:
    """What goes where, in the order in which the checkpoint has it, so that disks read forward."""
    owners: dict[str, Layer] = {}
    for layer in checkpoint.layers.values():
        owners[next(iter(layer.tensors.values()))] = layer
    others = set(checkpoint.others)
    shards = [Shard(number=1)]
    taken: set[str] = set()
    for tensor in checkpoint.tensors:
        if tensor in owners:
            owner = owners[tensor]
            expected, size = expected_of(owner), owner.nbytes
        elif tensor in others:
            entry = checkpoint.entry(tensor)
            expected, size = [(tensor, entry.dtype, entry.shape)], entry.nbytes
        else:
            continue
        nbytes = sum(nbytes_of(dtype, shape) for _, dtype, shape in expected)
        if shards[-1].expected and shards[-1].tensor_bytes + nbytes > shard_bytes:
            shards.append(Shard(number=len(shards) + 1))
        shard = shards[-1]
        if tensor in owners:
            shard.layers.append(owners[tensor])
        else:
            shard.others.append(tensor)
        shard.expected += expected
        shard.tensor_bytes += nbytes
        shard.source_bytes += size
        for name, _, _ in expected:
            if name in taken:
                raise FormatError(
                    f"{checkpoint.path}: {name} is both a tensor of the checkpoint and one of a"
                    " packed layer"
                )
            taken.add(name)
    for shard in shards:
        total = f"-{shard.number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        shard.name = f"model{total}.safetensors"
        shard.reserve = header_bound(shard.expected, METADATA)
        # Packed layers are multiples of 16 bytes; after them, the larger elements first.
        shard.others.sort(key=lambda name: alignment_order(checkpoint.entry(name).dtype))
    return shards


def expected_of(layer: Layer) -> list[tuple[str, str, tuple[int, ...]]]:
    """All tensors that the packed layer may have."""
    sizes = layer.sizes
    groups = (sizes.groups, sizes.n)
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("packed", "U8", (sizes.n, sizes.k // 2)),
        ("scales", "F16", groups),
    ]
    if sizes.has_points:
        found.append(("zeros", "F16", groups))
    if sizes.has_order or sizes.pads_inputs:
        found.append(("columns", "I32", (sizes.k,)))
    if sizes.has_bias:
        found.append(("bias", "F16", (sizes.n,)))
    return [(f"{layer.name}.{last}", dtype, shape) for last, dtype, shape in found]
