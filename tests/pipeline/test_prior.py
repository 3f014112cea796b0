"""Layer-wise methods as a stage: what the recipe says reaches the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leap.layerwise import sweep
from leap.surgery import decoder_blocks, prunable_linears
from pipeline.config import ModelConfig, PriorConfig
from pipeline.models import load_model
from pipeline.stages import prior
from pipeline.stages.calibrate import ShardWriter
from pipeline.storage import StageDir


@pytest.fixture
def calibration(tmp_path: Path) -> StageDir:
    stage = StageDir(str(tmp_path), "calibrate", "calibration", "0")
    with stage.work() as (directory, facts):
        writer = ShardWriter(directory, 32)
        writer.add(torch.randint(0, 400, (16, 32), generator=torch.Generator().manual_seed(0)).numpy())
        writer.close()
        facts["rows"] = 16
    return stage


def _prune(tmp_path: Path, tiny: Path, calibration: StageDir, method: str, **settings: Any) -> dict[str, Any]:
    """What the stage says of itself, and the masks by layer."""
    config = PriorConfig(rows=16, **settings)
    stage = StageDir(str(tmp_path), "prior", method, str(abs(hash(str(settings)))))
    model = ModelConfig(source=str(tiny / "model"))
    facts = prior.run(stage, method, 0.5, config.scopes_of(method)[0], config, model, calibration, 0)
    artifact = prior.PriorArtifact(stage.path())
    layers = {name: artifact.layer(name) for name in prunable_linears(load_model(model))}
    return {"facts": facts, "masks": {name: mask for name, (mask, _) in layers.items()}}


def test_a_pattern_holds_in_every_group(tmp_path: Path, tiny: Path, calibration: StageDir) -> None:
    for method in ("magnitude", "wanda", "admm"):
        pruned = _prune(tmp_path, tiny, calibration, method, pattern=(1, 2))
        assert pruned["facts"]["scope"] == "1:2"
        for mask in pruned["masks"].values():
            assert mask.reshape(len(mask), -1, 2).sum(-1).eq(1).all()


def test_options_reach_their_method_alone(tmp_path: Path, tiny: Path, calibration: StageDir) -> None:
    options = {"admm": {"schedule": "cubic", "precision": "float64"}}
    plain = _prune(tmp_path, tiny, calibration, "admm")["masks"]
    cubic = _prune(tmp_path, tiny, calibration, "admm", options=options)["masks"]
    assert any(not torch.equal(plain[name], cubic[name]) for name in plain)
    assert _equal(
        _prune(tmp_path, tiny, calibration, "wanda")["masks"],
        _prune(tmp_path, tiny, calibration, "wanda", options=options)["masks"],
    )


def test_spilling_changes_nothing(tmp_path: Path, tiny: Path, calibration: StageDir) -> None:
    assert _equal(
        _prune(tmp_path, tiny, calibration, "wanda")["masks"],
        _prune(tmp_path, tiny, calibration, "wanda", spill=True)["masks"],
    )


def test_one_decoder_block_is_held_at_a_time(
    tmp_path: Path, tiny: Path, calibration: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[str, list[str]]] = []

    def watched(model: Any, *arguments: Any, **options: Any) -> Any:
        for name, result in sweep(model, *arguments, **options):
            blocks = decoder_blocks(model)[1]
            kinds = [str(next(b.parameters()).dtype if not _on_meta(b) else "gone") for b in blocks]
            held.append((name, kinds))
            yield name, result

    def _on_meta(block: torch.nn.Module) -> bool:
        return all(parameter.is_meta for parameter in block.parameters())

    monkeypatch.setattr(prior, "sweep", watched)
    model = ModelConfig(source=str(tiny / "model"), dtype="bfloat16")  # not the type of its file
    prior.run(
        StageDir(str(tmp_path), "prior", "wanda", "1"), "wanda", 0.5, "row", PriorConfig(rows=16), model, calibration, 0
    )
    first, last = held[0][1], held[-1][1]
    assert first == ["torch.bfloat16", "torch.float32"], "the second is still the mapped file's"
    assert last == ["gone", "torch.bfloat16"]


def test_new_weights_are_the_priors_where_it_keeps_and_dense_elsewhere(
    tmp_path: Path, tiny: Path, calibration: StageDir
) -> None:
    model = ModelConfig(source=str(tiny / "model"))
    stage = StageDir(str(tmp_path), "prior", "admm", "0")
    prior.run(stage, "admm", 0.5, "row", PriorConfig(rows=16), model, calibration, 0)
    artifact = prior.PriorArtifact(stage.path())
    for name, linear in prunable_linears(load_model(model)).items():
        mask, weight = artifact.layer(name)[0], artifact.weight(name)
        new = artifact.new_weight(name, linear.weight.detach())
        assert weight is not None
        assert torch.equal(new[mask], weight[mask])
        assert torch.equal(new[~mask], linear.weight.detach()[~mask])
        assert not torch.equal(new, linear.weight)


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
