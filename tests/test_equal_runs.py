"""The comparison of two runs: blind to times and keys, and to nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from equal_runs import differences
from safetensors.torch import load_file, save_file


def _run(folder: Path, key: str, seconds: float) -> Path:
    for stage in ("calibrate/text", "learn/leap@0.5", "harden/leap@0.5", "evaluate/leap@0.5.text"):
        directory = folder / f"{stage}-{key * 16}"
        directory.mkdir(parents=True)
        manifest = {"seconds": seconds, "fingerprint": key * 16, "real_sparsity": 0.5}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (row,) = folder.glob("calibrate/*")
    pq.write_table(pa.table({"ids": [[1, 2], [3, 4]]}), row / "rows-00000.parquet")
    (learn,) = folder.glob("learn/*")
    save_file({"layer": torch.tensor([1.0, -0.0])}, learn / "logits.safetensors")
    (result,) = folder.glob("evaluate/*")
    (result / "result.json").write_text(json.dumps({"nll_per_row": [1.5, 2.5]}))
    variants = [{"name": "leap@0.5", "perplexity": 7.5, "seconds": seconds, "directory": str(folder)}]
    (folder / "results.json").write_text(json.dumps({"created": seconds, "variants": variants}))
    return folder


def test_times_places_and_keys_do_not_count(tmp_path: Path) -> None:
    assert differences(_run(tmp_path / "a", "0", 1.5), _run(tmp_path / "b", "f", 2.5)) == []


def _flip(run: Path) -> None:
    (file,) = run.glob("learn/*/logits.safetensors")
    save_file({"layer": load_file(file)["layer"].abs()}, file)


def _other_rows(run: Path) -> None:
    (file,) = run.glob("calibrate/*/rows-00000.parquet")
    pq.write_table(pa.table({"ids": [[1, 2], [3, 5]]}), file)


def _other_result(run: Path) -> None:
    (file,) = run.glob("evaluate/*/result.json")
    file.write_text(file.read_text().replace("2.5", "2.5000000001"))


def _other_table(run: Path) -> None:
    (run / "results.json").write_text((run / "results.json").read_text().replace("7.5", "7.6"))


def _lost_file(run: Path) -> None:
    next(run.glob("harden/*/manifest.json")).unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_flip, "learn/leap@0.5/logits.safetensors: layer differs in 1 bytes"),
        (_other_rows, "calibrate/text/rows-00000.parquet: other rows"),
        (_other_result, "evaluate/leap@0.5.text/result.json: nll_per_row[1] 2.5 became 2.5000000001"),
        (_other_table, "results.json: [0].perplexity 7.5 became 7.6"),
        (_lost_file, "harden/leap@0.5/manifest.json: only in "),
    ],
)
def test_whatever_else_differs_is_named(change: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    before, after = _run(tmp_path / "a", "0", 1.5), _run(tmp_path / "b", "f", 2.5)
    change(after)
    (found,) = differences(before, after)
    assert found.startswith(named)
