"""Rows of tokens that the calibration stage has packed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


class PackedRows:
    """Random access to the rows of a finished calibration stage; reads only the row groups it needs.

    Args:
        shuffle: seed of a fixed random order, so that the first rows are a sample of all sources; none: as packed.
    """

    def __init__(self, directory: Path, shuffle: int | None = None) -> None:
        self._files = [pq.ParquetFile(f, memory_map=True) for f in sorted(directory.glob("rows-*.parquet"))]
        self._starts = [0]
        self._groups: list[tuple[int, int]] = []
        for number, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
        self._order = None if shuffle is None else np.random.default_rng(shuffle).permutation(len(self))
        self._read = functools.lru_cache(maxsize=64)(self._read_group)

    def __len__(self) -> int:
        return self._starts[-1]

    def _read_group(self, at: int) -> np.ndarray:
        number, group = self._groups[at]
        column = self._files[number].read_row_group(group, columns=["tokens"]).column(0).combine_chunks()
        tokens: np.ndarray = column.flatten().to_numpy()
        return tokens.reshape(len(column), -1)

    def __getitem__(self, row: int) -> np.ndarray:
        """Tokens of row ``row``, counted modulo the number of rows. int32 [S]."""
        row %= len(self)
        if self._order is not None:
            row = int(self._order[row])
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        tokens: np.ndarray = self._read(at)[row - self._starts[at]]
        return tokens

    def take(self, first: int, count: int) -> np.ndarray:
        """Rows ``first`` … ``first + count − 1``, counted modulo the number of rows. int64 [count, S]."""
        return np.stack([self[i] for i in range(first, first + count)]).astype(np.int64)

    def batches(self, rows: int) -> Iterator[np.ndarray]:
        """All rows in order, in batches. int64 [rows, S]."""
        for first in range(0, len(self), rows):
            yield self.take(first, min(rows, len(self) - first))
