"""Seeded damage to video files: flipped bits, cut ends, spliced boxes, swapped headers."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")


@dataclass(frozen=True)
class Box:
    """A box of an MP4: its four letters and its bytes, header included, as a range of the file."""

    kind: bytes
    start: int
    end: int


def boxes_of(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """Every box of valid length, nested ones included; nothing for a file of another kind."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        if size < 8 or start + size > end:
            return
        yield Box(kind, start, start + size)
        if kind in _CONTAINERS:
            yield from boxes_of(data, start + 8, start + size)
        start += size


def flip_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Flip 1 to 256 bits, anywhere or near the beginning or the end, where indices lie."""
    damaged = bytearray(data)
    low, high = rng.choice(
        [(0, len(data)), (0, min(4096, len(data))), (max(0, len(data) - 4096), len(data))]
    )
    for _ in range(1 << rng.randrange(9)):
        damaged[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Keep the beginning of the file, from nothing to all but a byte; or drop its beginning."""
    cut = rng.randrange(len(data))
    return data[cut:] if rng.random() < 0.15 else data[:cut]


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Replace a box by one of another file, leave it out or repeat it; without boxes, use bytes.

    The other box is of the same kind if possible.
    """
    mine, theirs = list(boxes_of(data)), list(boxes_of(other))
    if not mine or not theirs:
        start, length = rng.randrange(len(data)), rng.randrange(1, 1 << rng.randrange(1, 16))
        taken = rng.randrange(len(other))
        return (
            data[:start] + other[taken : taken + length] + data[start + length * rng.randrange(2) :]
        )
    box = rng.choice(mine)
    what = rng.random()
    if what < 0.2:
        return data[: box.start] + data[box.end :]
    if what < 0.35:
        return data[: box.end] + data[box.start :]
    same = [candidate for candidate in theirs if candidate.kind == box.kind]
    new = rng.choice(same or theirs)
    return data[: box.start] + other[new.start : new.end] + data[box.end :]


def swap_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Join another file's beginning to this file's rest."""
    length = rng.choice([4, 8, 32, 256, 1024, 4096])
    return other[:length] + data[rng.choice([0, length]) :]


def blank(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Zero a range, as a faulty disk or download does."""
    start, length = rng.randrange(len(data)), 1 << rng.randrange(4, 15)
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


MUTATIONS: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    flip_bits,
    truncate,
    splice,
    swap_header,
    blank,
)


def mutated(files: list[Path], seed: int) -> tuple[str, bytes]:
    """The damage to each file and its result; the same for the same seed and files."""
    rng = random.Random(seed)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    path, other = rng.choice(files), rng.choice(files)
    return f"{seed}-{mutate.__name__}-{path.name}", mutate(
        rng, path.read_bytes(), other.read_bytes()
    )
