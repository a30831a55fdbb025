"""enwik8, the first 100,000,000 bytes of a dump of English Wikipedia of 2006.

It is downloaded once, checked and kept.
"""

from __future__ import annotations

import hashlib
import os
import socket
import zipfile
import zlib
from pathlib import Path

ENWIK8 = "enwik8"
URL = "https://mattmahoney.net/dc/enwik8.zip"
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
# ends of the training and the held-out part; the last 5,000,000 bytes are the benchmark's test set
SPLIT = (90_000_000, 95_000_000)


def cache_folder() -> Path:
    """``$CUMULANT_CACHE``, else ``cumulant`` in the user's cache folder."""
    chosen = os.environ.get("CUMULANT_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cumulant"
    )


def load_enwik8() -> tuple[bytes, bytes]:
    """Its first 90,000,000 bytes, and the next 5,000,000, each ending at a whole character.

    Raises:
        ValueError: the download fails, or its content is not enwik8.
    """
    path = cache_folder() / "enwik8.zip"
    if not path.is_file():
        _download(path)
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("enwik8")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(
            f"data: {path} is damaged ({error}); remove it, and it is fetched again"
        ) from error
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise ValueError(
            f"data: the text in {path} is not enwik8; remove it, and it is fetched again"
        )
    first, second = (_next_character(text, at) for at in SPLIT)
    return text[:first], text[first:second]


def _download(path: Path) -> None:
    from torch.hub import download_url_to_file

    path.parent.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        download_url_to_file(URL, str(path), hash_prefix=ZIP_SHA256, progress=False)
    except OSError as error:
        raise ValueError(
            f"data: cannot download enwik8 from {URL} ({error}); pass --data with a text of your"
            f" own, or put enwik8.zip at {path}"
        ) from error
    except RuntimeError as error:  # a wrong checksum
        raise ValueError(
            f"data: what came from {URL} is not enwik8: its SHA-256 differs; nothing was kept"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _next_character(text: bytes, at: int) -> int:
    """The next offset that is not inside a UTF-8 character."""
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at
