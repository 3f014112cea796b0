"""Nested mappings, which recipes and configurations are."""

from __future__ import annotations

from typing import Any


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping. One of another ``kind`` takes nothing from what it covers."""
    merged = dict(below)
    for key, value in above.items():
        covered = merged.get(key)
        if isinstance(value, dict) and isinstance(covered, dict) and _same_kind(covered, value):
            merged[key] = merge(covered, value)
        else:
            merged[key] = value
    return merged


def _same_kind(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return "kind" not in one or "kind" not in other or one["kind"] == other["kind"]
