"""Hostile control files: real ones, mutated, a number of which always makes the same file.

A third of the files has a field overwritten, a third is put together wrongly, a third is damaged blindly;
some of them twice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from random import Random

from fuzz.corpus import (
    ALIGNMENT,
    ARRAY,
    N_EMBD,
    N_LAYER,
    SIZES,
    STRING,
    Seed,
    Tensor,
    corpus,
    counted,
    encode,
)

__all__ = ["corpus", "mutated"]

_EDGES = (0, 1, 2, 3, 4, 5, 31, 63, 64, 65, 255, 2**15, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1)
_EDGES_64 = (*_EDGES, 2**32, 2**32 + N_EMBD, 2**40, 2**61, 2**62, 2**63 - 32, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = tuple(
    struct.pack("<f", value)
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-38, 3.4e38, -1.0, 2.0)
)
_NAMES = (
    *(b"direction.0", b"direction.1", b"direction.2", b"projection.0", b"projection.1", b"projection.2"),
    *(b"direction.", b"direction", b"", b".", b"direction.-1", b"direction.01", b"direction.1 "),
    *(b"direction.65535", b"direction.99999", b"direction.100000", b"direction.4294967297", b"projection.3"),
    *(
        b"direction.1\0",
        b"projection.1.2",
        b"direction.\xd9\xa1",
        b"\xff\xfe",
        b"GGUF tensor data binary blob",
    ),
    *(b"direction." + b"1" * 40, b"d" * 63, b"d" * 64, b"projection." * 500, b"%s%n", b"alignez.guard"),
)
_KEYS = (
    *(b"general.architecture", b"general.alignment", b"alignez.format_version", b"controlvector.model_hint"),
    *(b"alignez.model.arch", b"alignez.model.n_embd", b"alignez.model.n_layer", b"alignez.layer.accuracy"),
    *(b"alignez.recipe.a", b"alignez.score.a", b"glp.mode", b"", b"\0", b"\xff", b"k" * 70_000),
)


def mutated(seeds: Sequence[Seed], seed: int, number: int) -> bytes:
    """File `number` of the ones that `seed` makes."""
    random = Random(seed << 40 | number)
    chosen = random.choice(seeds)
    data = random.choice(_MUTATIONS)(random, chosen, seeds)
    while random.random() < 0.4:
        data = _damage(random, data, seeds)
    return data


def _overwrite(random: Random, seed: Seed, seeds: Sequence[Seed]) -> bytes:
    """A few fields say something else."""
    data = bytearray(seed.data)
    for _ in range(random.choice((1, 2, 2, 3))):
        at, width = random.choice(seed.fields)
        old = int.from_bytes(data[at : at + width], "little")
        new = random.choice(_EDGES_64 if width == 8 else _EDGES)
        new = random.choice(
            (new, old + 1, old - 1, old ^ 1 << random.randrange(8 * width), random.getrandbits(16))
        )
        data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(data)


def _rebuild(random: Random, seed: Seed, seeds: Sequence[Seed]) -> bytes:
    """Parts are changed, repeated, left out or taken from another file, and put together."""
    metadata, tensors = list(seed.metadata), list(seed.tensors)
    for _ in range(random.choice((1, 1, 2, 2, 3))):
        random.choice(_REBUILDS)(random, metadata, tensors, random.choice(seeds))
    return encode(metadata, tensors)


def _blind(random: Random, seed: Seed, seeds: Sequence[Seed]) -> bytes:
    return _damage(random, seed.data, seeds)


_MUTATIONS = (_overwrite, _rebuild, _blind)


def _damage(random: Random, data: bytes, seeds: Sequence[Seed]) -> bytes:
    """Bits flipped, bytes set, cut, doubled, taken out or taken over, without knowledge of the format."""
    at = random.randrange(len(data) + 1)
    kind = random.randrange(6)
    if kind < 2:
        damaged = bytearray(data)
        for _ in range(min(len(data), random.choice((1, 2, 4, 8, 64)))):
            place = random.randrange(len(data))
            damaged[place] = (
                damaged[place] ^ 1 << random.randrange(8) if kind else random.choice(b"\0\x7f\x80\xff")
            )
        return bytes(damaged)
    end = min(len(data), at + random.choice((1, 4, 8, 32, 300)))
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at:end] * random.choice((2, 3, 20)) + data[end:]
    if kind == 4:
        return data[:at] + data[end:]
    other = random.choice(seeds).data
    return data[:at] + other[random.choice((at, random.randrange(len(other)))) :]


def _change_key(random: Random, metadata: list[bytes], tensors: list[Tensor], other: Seed) -> None:
    """A key is repeated, left out, moved, taken from another file, or made up."""
    kind = random.randrange(5)
    place = random.randrange(len(metadata)) if metadata else 0
    if kind == 0 and metadata:
        metadata.append(metadata[place])
    elif kind == 1 and metadata:
        del metadata[place]
    elif kind == 2:
        random.shuffle(metadata)
    elif kind == 3:
        metadata.insert(place, random.choice(other.metadata))
    else:
        metadata.insert(place, counted(random.choice(_KEYS)) + _value(random))


def _value(random: Random) -> bytes:
    """A type and a value, which may be an array, in an array, or of another type than it says."""
    kind = random.choice((*SIZES, *SIZES, STRING, ARRAY, 13, 2**31, 2**32 - 1))
    number = (random.choice(_EDGES_64) % 2**64).to_bytes(8, "little")
    if kind == STRING:
        return struct.pack("<I", kind) + counted(
            random.choice((b"llama", b"", b"\xff", b"x\0y", b"t" * 5000))
        )
    if kind == ARRAY:
        inner = random.choice((*SIZES, STRING, ARRAY))
        length = random.choice((0, 1, N_LAYER, 5000, random.choice(_EDGES_64)))
        body = bytes(min(length, 5000) * SIZES.get(inner, 8))
        return struct.pack("<IIQ", kind, inner, length) + body
    return struct.pack("<I", kind) + number[: SIZES.get(kind, 8)]


def _change_tensors(random: Random, metadata: list[bytes], tensors: list[Tensor], other: Seed) -> None:
    """A tensor is repeated, left out, moved, or taken from another file; or there are very many."""
    kind = random.randrange(6)
    chosen = random.choice(tensors or other.tensors)
    if kind == 0:
        tensors.append(chosen)
    elif kind == 1 and tensors:
        tensors.remove(chosen)
    elif kind == 2:
        random.shuffle(tensors)
    elif kind == 3:
        tensors.append(random.choice(other.tensors))
    elif kind == 4:
        tensors.clear()
    elif random.random() < 0.05:
        real = random.choice(other.tensors)
        count = random.choice((99, 300))
        tensors.extend(replace(real, name=b"direction.%d" % layer) for layer in range(count))


def _change_tensor(random: Random, metadata: list[bytes], tensors: list[Tensor], other: Seed) -> None:
    """One tensor has another name, shape, type, place or content."""
    if not tensors:
        return
    place = random.randrange(len(tensors))
    tensor = tensors[place]
    change = random.choice(("name", "shape", "shape", "kind", "offset", "values", "data"))
    if change == "name":
        tensor = replace(tensor, name=random.choice(_NAMES))
    elif change == "shape":
        tensor = replace(tensor, shape=_shape(random, tensor))
        if random.random() < 0.7:
            tensor = replace(tensor, data=_resized(tensor))
    elif change == "kind":
        tensor = replace(
            tensor, kind=random.choice((1, 2, 8, 14, 24, 26, 28, 30, 39, 40, 255, 2**31, 2**32 - 1))
        )
    elif change == "offset":
        tensor = replace(tensor, offset=random.choice((*_EDGES_64, ALIGNMENT, 2 * ALIGNMENT)))
    elif change == "values":
        values = bytearray(tensor.data)
        for _ in range(random.choice((1, 1, 3))):
            at = 4 * random.randrange(max(1, len(values) // 4))
            values[at : at + 4] = random.choice((*_FLOATS, random.randbytes(4)))
        tensor = replace(tensor, data=bytes(values))
    else:
        tensor = replace(tensor, data=random.choice(_FLOATS) * (len(tensor.data) // 4))
    tensors[place] = tensor


def _shape(random: Random, tensor: Tensor) -> tuple[int, ...]:
    n = tensor.shape[0] if tensor.shape else N_EMBD
    edge = random.choice(_EDGES_64)
    shapes: tuple[tuple[int, ...], ...] = (
        *((n, 0), (0,), (0, n), (n, 1), (n, 2), (n, n), (n, n + 1), (n, 1, 1, 1), (n, 0, 0, 0), (n, 1, 2)),
        *((1,), (1, n), (n + 1,), (2 * n,), (), (n, 1, 1, 1, 1), (edge,), (n, edge), (edge, 0), (edge, edge)),
        tensor.shape[::-1],
    )
    chosen = random.choice(shapes)
    return tuple(extent % 2**64 for extent in chosen)


def _resized(tensor: Tensor) -> bytes:
    """Data of the size that the shape asks for, where that is small."""
    size = min(4 * prod(tensor.shape), 2**16)
    return (tensor.data * (size // max(1, len(tensor.data)) + 1))[:size]


_REBUILDS: tuple[Callable[[Random, list[bytes], list[Tensor], Seed], None], ...] = (
    _change_key,
    _change_tensors,
    _change_tensor,
    _change_tensor,
)
