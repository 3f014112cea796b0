"""The speed of a pruned model: what is measured, of which layers, and what the table says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError

from leap.export import export
from leap.packed import MaskFile
from leap.surgery import prunable_linears
from pipeline.config import BenchmarkConfig, ModelConfig, recipe
from pipeline.evaluation import decode_speed, matrix_speed
from pipeline.execution.plan import make_plan
from pipeline.model import loading
from pipeline.stages.benchmark import Benchmark


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """The work on an export as the stage ``harden`` leaves it; one layer much sparser than the others."""
    overrides = [f"output={tmp_path_factory.mktemp('runs')}", "benchmark={seconds: 0.01, tokens: 3, rounds: 2}"]
    (benchmark,) = make_plan(recipe.load(str(tiny / "tiny.yaml"), overrides)).of(Benchmark)
    model = loading.load_model(ModelConfig(source=str(tiny / "model")))
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(linear.weight.shape, generator=generator) < 0.5 for linear in prunable_linears(model).values()]
    masks[0][:, 1:] = False
    with benchmark.export.directory.work() as (directory, _):
        export(model, None, lambda number, _: (masks[number], None), directory, {})
    return benchmark


def test_a_stage_measures_every_shape_and_dtype(measured: Benchmark) -> None:
    threads = torch.get_num_threads()
    benchmark = replace(measured, config=measured.config.model_copy(update={"threads": threads + 1}))
    benchmark.run()
    assert torch.get_num_threads() == threads
    found = benchmark.read()
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
        decoding = found["decode"][dtype]
        for time in (decoding["dense"], decoding["sparse"]):
            assert min(cast("dict[str, float]", time).values()) >= 0
            assert time["tokens_per_second"] == pytest.approx(1e3 / time["token_ms"])
            assert time["linears_ms"] > 0
            assert time["head_ms"] > 0
        speedups = [decoding["speedup_low"], decoding["speedup"], decoding["speedup_high"]]
        assert speedups == sorted(speedups)


def test_both_models_decode_the_same_text_and_share_what_is_not_pruned(tiny: Path, measured: Benchmark) -> None:
    pruned = measured.export.directory.path()
    dense = loading.load_model(ModelConfig(source=str(tiny / "model")), pruned)
    sparse = decode_speed.packed_copy(dense, MaskFile(pruned))
    assert sparse.get_input_embeddings().weight is dense.get_input_embeddings().weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-5)
    assert len(decode_speed.decode(sparse, ids, 4)) == 4


def test_layers_count_as_often_as_the_model_has_them() -> None:
    rows: Any = [{"layers": 1, "dense_us": 10.0, "sparse_us": 2.0}, {"layers": 3, "dense_us": 10.0, "sparse_us": 10.0}]
    assert matrix_speed.speedup(rows) == pytest.approx(40 / 32)


@pytest.mark.parametrize("dtypes", [[], ["float32", "float32"]])
def test_number_types_are_named_once(dtypes: list[str]) -> None:
    with pytest.raises(ValidationError, match="one or more different"):
        BenchmarkConfig.model_validate({"dtypes": dtypes})
