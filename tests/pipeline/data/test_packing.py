"""Rows from blocks of any size: the same rows, counts and files, and the same end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.packing import OTHER_SHARE, SHARED, WITHOUT_TEXT, Packer
from pipeline.stages import calibrate
from pipeline.stages.calibrate import ShardWriter

LENGTHS = [WITHOUT_TEXT, 3, 1, OTHER_SHARE, SHARED, 40, WITHOUT_TEXT, 2, 2, 7, 1, 1, SHARED, 90, 5, 5]
TOTAL = sum(length for length in LENGTHS if length > 0)


def _packed(
    directory: Path, lengths: list[int], cuts: list[int], wanted: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The counts and the files of records that come in blocks cut at ``cuts``."""
    directory.mkdir()
    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
    tokens = np.arange(starts[-1], dtype=np.int32)
    writer = ShardWriter(directory, 4)
    packer = Packer(wanted, writer.add)
    edges = [0, *cuts, len(lengths)]
    for first, last in itertools.pairwise(edges):
        names = [str(number) for number in range(first, last) if lengths[number] > 0]
        packer.add(np.array(lengths[first:last], dtype=int), tokens[starts[first] : starts[last]], names, names)
        if packer.full:
            break
    writer.close()
    counts = {name: value for name, value in vars(packer).items() if name != "write"}
    return counts, {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("wanted", [4, 44, 48, TOTAL // 4 * 4, TOTAL // 4 * 4 + 4])
def test_blocks_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    monkeypatch.setattr(calibrate, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(calibrate, "ROWS_PER_SHARD", 8)
    expected = _packed(tmp_path / "whole", LENGTHS, [], wanted)
    rng = np.random.default_rng(0)
    cases = [sorted(rng.integers(0, len(LENGTHS), size).tolist()) for size in (1, 2, 3, 5, 9)]
    for number, cuts in enumerate([*cases, list(range(1, len(LENGTHS)))]):
        assert _packed(tmp_path / str(number), LENGTHS, cuts, wanted) == expected, cuts


def test_what_is_counted_ends_with_the_document_of_the_last_token(tmp_path: Path) -> None:
    counts, _ = _packed(tmp_path / "a", LENGTHS, [6], 44)  # 3 + 1 + 40
    assert counts["documents"] == 3
    assert counts["records"] == 6
    assert list(counts["texts"]) == ["1", "2", "5"]
    assert (counts["records_without_text"], counts["shared_documents_dropped"], counts["leading"]) == (1, 1, 1)
    assert _packed(tmp_path / "b", LENGTHS, [6], 48)[0]["documents"] == 5
    assert _packed(tmp_path / "c", [WITHOUT_TEXT] * 3, [1], 48)[0]["leading"] == 3


def test_tokens_that_fill_no_row_are_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 4)
    for part in np.split(np.arange(11, dtype=np.int32), [1, 2, 9]):
        writer.add(part)
    writer.close()
    assert writer.rows == 2
    empty = ShardWriter(tmp_path, 4)
    empty.close()
    assert empty.rows == 0
