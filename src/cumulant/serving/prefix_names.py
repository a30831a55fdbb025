"""The names of files with snapshots, which tell where these belong."""

from __future__ import annotations

import re
import zlib

import torch

from .place import Place
from .snapshots import Snapshot

WITH, WITHOUT = "l", "s"  # the end of a name: whether the file has logits; the better is less
NAME = re.compile(
    rf"([0-9a-f]{{32}})-(0|[1-9][0-9]{{0,8}})-[0-9a-f]{{32}}-[{WITH}{WITHOUT}]\.safetensors"
)


def short(key: bytes) -> str:
    """The part of a hash in a name; zeros for no tokens."""
    return key[:16].hex().ljust(32, "0")


def ending(snapshot: Snapshot) -> str:
    """The end of a name."""
    return WITHOUT if snapshot.logits is None else WITH


def file_name(place: Place, letter: str) -> str:
    """The name of a snapshot's file."""
    return f"{short(place.chain)}-{place.tail}-{short(place.key)}-{letter}.safetensors"


def checksum(snapshot: Snapshot) -> str:
    """CRC-32 of all tensors with their names: for damage that a file's header does not show."""
    total = 0
    for name, x in sorted(snapshot.tensors().items()):
        total = zlib.crc32(f"{name} {x.dtype} {list(x.shape)}".encode(), total)
        total = zlib.crc32(x.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
