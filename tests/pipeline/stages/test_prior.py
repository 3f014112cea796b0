"""Layer-wise methods as a stage: what the recipe says reaches the method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap.layerwise import METHODS, InputStatistics, LayerResult, Target, select_mask, sweep
from leap.layerwise.base import layer_method
from leap.surgery import decoder_blocks, prunable_linears
from pipeline.config import Dtype, PriorConfig
from pipeline.config.recipe import load
from pipeline.errors import UserError
from pipeline.execution.plan import make_plan
from pipeline.model.loading import load_model
from pipeline.model.sizes import measure
from pipeline.stages import prior
from pipeline.stages.calibrate import Calibrate, ShardWriter
from pipeline.stages.cost import Machine
from pipeline.stages.learn import Learn
from pipeline.stages.prior import Prior


@pytest.fixture
def calibration(tiny: Path, tmp_path: Path) -> Calibrate:
    text = make_plan(load(str(tiny / "tiny.yaml"), [f"output={tmp_path}"])).corpus("calibration")
    with text.directory.work() as (directory, facts):
        writer = ShardWriter(directory, 32)
        writer.add(torch.randint(0, 400, (16, 32), generator=torch.Generator().manual_seed(0)).numpy())
        writer.close()
        facts["rows"] = 16
    return text


def _work(calibration: Calibrate, method: Any, dtype: Dtype = "float32", **settings: Any) -> Prior:
    config = PriorConfig(rows=16, **settings)
    model = replace(calibration.model, config=calibration.model.config.model_copy(update={"dtype": dtype}))
    return Prior(calibration.store, model, method, config.scopes_of(method)[0], 0.5, config, calibration, 0)


def _prune(calibration: Calibrate, method: str, **settings: Any) -> dict[str, Any]:
    """What the stage says of itself, and the masks by layer."""
    work = _work(calibration, method, **settings)
    work.run()
    artifact = work.read()
    layers = {name: artifact.layer(name) for name in prunable_linears(load_model(work.model.config))}
    return {"facts": work.facts, "masks": {name: mask for name, (mask, _) in layers.items()}}


def test_a_pattern_holds_in_every_group(calibration: Calibrate) -> None:
    for method in ("magnitude", "wanda", "admm"):
        pruned = _prune(calibration, method, pattern=(1, 2))
        assert pruned["facts"]["scope"] == "1:2"
        for mask in pruned["masks"].values():
            assert mask.reshape(len(mask), -1, 2).sum(-1).eq(1).all()


def test_options_reach_their_method_alone(calibration: Calibrate) -> None:
    options = {"admm": {"schedule": "cubic", "precision": "float64"}}
    plain = _prune(calibration, "admm")["masks"]
    cubic = _prune(calibration, "admm", options=options)["masks"]
    assert any(not torch.equal(plain[name], cubic[name]) for name in plain)
    assert _equal(
        _prune(calibration, "wanda")["masks"],
        _prune(calibration, "wanda", options=options)["masks"],
    )


def test_spilling_changes_nothing(calibration: Calibrate) -> None:
    assert _equal(
        _prune(calibration, "wanda")["masks"],
        _prune(calibration, "wanda", spill=True)["masks"],
    )


def test_one_decoder_block_is_held_at_a_time(calibration: Calibrate, monkeypatch: pytest.MonkeyPatch) -> None:
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
    _work(calibration, "wanda", "bfloat16").run()  # not the type of the model's file
    first, last = held[0][1], held[-1][1]
    assert first == ["torch.bfloat16", "torch.float32"], "the second is still the mapped file's"
    assert last == ["gone", "torch.bfloat16"]


def test_new_weights_are_the_priors_where_it_keeps_and_dense_elsewhere(calibration: Calibrate) -> None:
    work = _work(calibration, "admm")
    work.run()
    artifact = work.read()
    for name, linear in prunable_linears(load_model(work.model.config)).items():
        mask, weight = artifact.layer(name)[0], artifact.weight(name)
        new = artifact.new_weight(name, linear.weight.detach())
        assert weight is not None
        assert torch.equal(new[mask], weight[mask])
        assert torch.equal(new[~mask], linear.weight.detach()[~mask])
        assert not torch.equal(new, linear.weight)


def test_a_new_method_is_one_entry_of_the_registry(
    tiny: Path, tmp_path: Path, calibration: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe takes its name, its cost is known, and it is run and started from like any other."""

    @layer_method(needs="norm", changes_weights=False)
    def toy(weight: torch.Tensor, stats: InputStatistics, target: Target, *, column: int = 0) -> LayerResult:
        score = torch.arange(weight.shape[1]).flip(0).expand_as(weight).float()
        return LayerResult(select_mask(score.roll(column, 1), target), weight, score)

    overrides = ["prior.methods=[toy]", "prior.options={toy: {column: 1}}", "learn.leap.settings.prior=toy"]
    file = str(tiny / "tiny.yaml")
    with pytest.raises(UserError, match=r"prior\.methods.*must be one of magnitude, .*, optima, not 'toy'"):
        load(file, overrides)
    monkeypatch.setitem(METHODS, "toy", toy)
    plan = make_plan(load(file, [*overrides, f"output={tmp_path}"]))
    (work,) = plan.of(Prior)
    assert plan.of(Learn)[0].prior == work
    cost = work.cost(measure(plan.config), Machine(cpu=1e9, gpus=False))
    assert cost.seconds
    assert cost.disk
    work.run()
    for name, linear in prunable_linears(load_model(work.model.config)).items():
        mask, _ = work.read().layer(name)
        assert mask.sum() == mask.numel() // 2
        assert mask[:, 1].all(), name
        assert linear.weight.shape == mask.shape


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
