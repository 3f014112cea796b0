"""Damage to files, as a disk or a network does it."""

from __future__ import annotations


def flipped(content: bytes, bit: int) -> bytes:
    """``content`` with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
