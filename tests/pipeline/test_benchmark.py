"""The speed of a pruned model: what is measured, of which layers, and what the table says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from leap.export import export
from leap.packed import MaskFile
from leap.surgery import prunable_linears
from pipeline import models
from pipeline.config import BenchmarkConfig, ModelConfig
from pipeline.plan import Variant
from pipeline.results import _add_speeds
from pipeline.speed import decode, matrices
from pipeline.stages import benchmark
from pipeline.storage import StageDir


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    """An export as the stage ``harden`` leaves it; one layer much sparser than the others."""
    stage = StageDir(str(tmp_path_factory.mktemp("runs")), "harden", "leap@0.5", "key")
    model = models.load_model(ModelConfig(source=str(tiny / "model")))
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(linear.weight.shape, generator=generator) < 0.5 for linear in prunable_linears(model).values()]
    masks[0][:, 1:] = False
    with stage.work() as (directory, _):
        export(model, None, lambda number, _: (masks[number], None), directory, {})
    return stage


def test_a_stage_measures_every_shape_and_number_type(tiny: Path, pruned: StageDir, tmp_path: Path) -> None:
    stage = StageDir(str(tmp_path), "benchmark", "leap@0.5", "key")
    threads = torch.get_num_threads()
    settings = BenchmarkConfig(seconds=0.01, tokens=3, rounds=2, threads=threads + 1)
    benchmark.run(stage, ModelConfig(source=str(tiny / "model")), pruned, settings)
    assert torch.get_num_threads() == threads
    found = benchmark.result(stage)
    assert f"{threads + 1} threads" in found["machine"]
    for dtype in ("bfloat16", "float32"):
        rows = [row for row in found["matrices"] if row["dtype"] == dtype]
        # Two blocks: q and o; k and v; gate and up; down.
        assert {tuple(row["shape"]): row["layers"] for row in rows} == {
            (36, 36): 4,
            (12, 36): 4,
            (50, 36): 4,
            (36, 50): 2,
        }
        for row in rows:
            assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
            assert row["bandwidth"] > 0
            assert 0.3 < row["sparsity"] < 0.7, "not the odd one out"
        for name in ("dense", "sparse"):
            time = found["decode"][dtype][name]
            assert min(time.values()) >= 0
            assert time["tokens_per_second"] == pytest.approx(1e3 / time["token_ms"])
            assert time["linears_ms"] > 0
            assert time["head_ms"] > 0
        speedups = [found["decode"][dtype][key] for key in ("speedup_low", "speedup", "speedup_high")]
        assert speedups == sorted(speedups)


def test_both_models_decode_the_same_text_and_share_what_is_not_pruned(tiny: Path, pruned: StageDir) -> None:
    dense = models.load_model(ModelConfig(source=str(tiny / "model")), pruned.path())
    sparse = decode.packed_copy(dense, MaskFile(pruned.path()))
    assert sparse.get_input_embeddings().weight is dense.get_input_embeddings().weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-5)
    assert len(decode.decode(sparse, ids, 4)) == 4


def test_layers_count_as_often_as_the_model_has_them() -> None:
    rows = [{"layers": 1, "dense_us": 10.0, "sparse_us": 2.0}, {"layers": 3, "dense_us": 10.0, "sparse_us": 10.0}]
    assert matrices.speedup(rows) == pytest.approx(40 / 32)


def test_the_dense_row_gets_the_median_and_the_models_own_number_type_counts() -> None:
    def measured(dense: float, sparse: float) -> dict[str, Any]:
        found = {"dense": {"tokens_per_second": dense}, "sparse": {"tokens_per_second": sparse}}
        return {"decode": {"bfloat16": {"dense": {}, "sparse": {}}, "float32": found}}

    names = [("dense", None), ("wanda", 0.5), ("leap", 0.5), ("leap", 0.6), ("leap", 0.7)]
    rows: list[dict[str, Any]] = [{"method": method, "target_sparsity": sparsity} for method, sparsity in names]
    rows[3:3] = [{**rows[2], "mean": "leap@0.5"}]  # one of several seeds; the row before it is their mean
    found = {0.5: measured(10, 15), 0.6: measured(12, 18), 0.7: measured(11, 20)}
    _add_speeds(rows, [(Variant("leap", sparsity), speed) for sparsity, speed in found.items()], "float32")
    assert [row.get("decode_tokens_per_second") for row in rows] == [11, None, 15, None, 18, 20]
    untouched: list[dict[str, Any]] = [{"method": "dense", "target_sparsity": None}]
    _add_speeds(untouched, [], "float32")
    assert "decode_tokens_per_second" not in untouched[0]


@pytest.mark.parametrize("dtypes", [[], ["float32", "float32"]])
def test_number_types_are_named_once(dtypes: list[str]) -> None:
    with pytest.raises(ValidationError, match="one or more different"):
        BenchmarkConfig.model_validate({"dtypes": dtypes})
