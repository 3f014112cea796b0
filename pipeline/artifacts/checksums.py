"""Checksums: what tells damage from what was written, and one content from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

CHECKSUM, FILES = "checksum", "files"
_CHUNK = 1 << 20


def of_bytes(content: bytes) -> str:
    """The checksum of ``content``: XXH3 of 128 bits, in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def of_stream(file: BinaryIO) -> str:
    """The checksum of what is left to read of a file."""
    digest = xxhash.xxh3_128()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def of_file(path: str | Path) -> str:
    """The checksum of a file's content."""
    with Path(path).open("rb") as file:
        return of_stream(file)


def entry(path: str | Path) -> dict[str, Any]:
    """What a manifest says of a file: ``bytes`` and ``xxh3``."""
    return {"bytes": Path(path).stat().st_size, "xxh3": of_file(path)}


def entry_of_bytes(content: bytes) -> dict[str, Any]:
    """The same of a file that holds ``content``."""
    return {"bytes": len(content), "xxh3": of_bytes(content)}


def seal(facts: dict[str, Any]) -> str:
    """``facts`` as JSON, with a checksum over all of them."""
    return json.dumps(facts | {CHECKSUM: _of_facts(facts)}, indent=1)


def unseal(text: str | bytes) -> dict[str, Any]:
    """What :func:`seal` was given. Facts without files and checksum are of a version that knew neither.

    Raises:
        ValueError: the text was cut off or altered.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("not a JSON object")
    checksum = facts.pop(CHECKSUM, None)
    # One of the two without the other is no older version, but a key that was altered.
    if (checksum is not None or FILES in facts) and checksum != _of_facts(facts):
        raise ValueError("the checksum does not fit")
    return facts


def _of_facts(facts: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(facts))  # tuples are lists by then, and keys text
    return of_bytes(json.dumps(plain, sort_keys=True).encode())
