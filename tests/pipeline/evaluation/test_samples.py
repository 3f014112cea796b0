"""Prompts from packed rows, and seeded continuations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts.packed_rows import PackedRows
from pipeline.config import ModelConfig
from pipeline.evaluation.samples import beginnings, continuations
from pipeline.model import loading
from pipeline.stages.mask_map import TILES, tile_density

END = 9


def rows(directory: Path, tokens: list[list[int]]) -> PackedRows:
    ids = pa.array(range(len(tokens)))
    table = pa.table({"row_id": ids, "tokens": pa.array(tokens, pa.list_(pa.int32(), len(tokens[0])))})
    pq.write_table(table, directory / "rows-00000.parquet")
    return PackedRows(directory)


def test_prompts_begin_where_documents_do(tmp_path: Path) -> None:
    packed = rows(tmp_path, [[1, 2, END, 3, END, 4, 5, 6], [1, 1, 1, 1, 1, 1, END, 2], [1, END, 2, 3, 4, 5, END, 7]])
    assert beginnings(packed, END, 3, 3) == [[4, 5, 6], [1, 1, 1], [2, 3, 4]]
    assert beginnings(packed, END, 2, 4) == [[1, 2, END, 3], [2, 3, 4, 5]], "none in the first part, one in the second"
    with pytest.raises(ValueError, match="rows of 8 tokens hold no prompt of 9"):
        beginnings(packed, END, 1, 9)


def test_continuations_are_seeded(tiny: Path) -> None:
    model = loading.load_model(ModelConfig(source=str(tiny / "model")))
    prompts = [[5, 6, 7], [8, 9, 10]]
    state = torch.random.get_rng_state()
    first = continuations(model, prompts, 8, 1.0, 0, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == continuations(model, prompts, 8, 1.0, 0, seed=3)
    assert first != continuations(model, prompts, 8, 1.0, 0, seed=4)
    assert [len(text) <= 8 for text in first] == [True, True]


@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**31))
def test_tiles_keep_the_density_of_what_they_cover(out: int, into: int, seed: int) -> None:
    mask = torch.rand(out, into, generator=torch.Generator().manual_seed(seed)) < 0.5
    tiles = tile_density(mask)
    assert max(tiles.shape) <= TILES
    first = mask[: -(-out // tiles.shape[0]), : -(-into // tiles.shape[1])].double().mean()
    np.testing.assert_allclose(float(tiles[0, 0]), float(first), rtol=1e-5, atol=1e-6)
