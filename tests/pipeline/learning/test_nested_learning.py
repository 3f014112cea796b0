"""A worker that learns one set of logits for several sparsities: masks, what is watched, and continuing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from leap.losses import output_losses
from leap.surgery import prunable_linears
from pipeline.artifacts.learned_masks import learned_masks
from pipeline.artifacts.logit_checkpoint import Checkpoint
from pipeline.config import recipe
from pipeline.execution.plan import make_plan
from pipeline.model import loading
from pipeline.results.collect import training_curves
from pipeline.stages import calibrate
from pipeline.stages.learn import Learn
from pipeline.stages.planned import Plan

STEPS, SPARSITIES = 11, (0.5, 0.7, 0.6)
OVERRIDES = [
    f"sparsities={list(SPARSITIES)}",
    "learn.leap.nested=true",
    "learn.leap.workers=1",
    f"learn.leap.settings.steps={STEPS}",
    "learn.leap.settings.optimiser=adam8bit-bf16",
    "learn.leap.checkpoint_every=4",
    "learn.leap.watch_every=5",
    "evaluate.cloze=null",
]
#: Runs the worker of the plan's learning run in this process; the first argument is the checkpoint to die after.
WORKER = """
import os, sys
from types import SimpleNamespace
import ray.train
import torch.distributed as dist
from pipeline.learning import worker
from pipeline.execution.plan import make_plan
from pipeline.config import recipe
from pipeline.stages.learn import Learn

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ray.train.report = lambda metrics: None
ray.get = lambda sent: None  # the board below has heard it already


def push(event):
    if event.get("checkpoint") == int(sys.argv[1]):
        os._exit(7)


plan = make_plan(recipe.load(sys.argv[2], sys.argv[3:]))
(learn,) = plan.of(Learn)
worker.train_loop({"job": learn.job(SimpleNamespace(push=SimpleNamespace(remote=push)))})
"""


def learned(tiny: Path, output: Path, die_after: int, code: int = 0, changes: tuple[str, ...] = ()) -> Plan:
    """Learn, from random rows, in a process of its own."""
    recipe_file, overrides = str(tiny / "tiny.yaml"), [*OVERRIDES, f"output={output}", *changes]
    plan = make_plan(recipe.load(recipe_file, overrides))
    (learn,) = plan.of(Learn)
    for seed, text in enumerate((learn.calibration, learn.heldout)):
        if not text.finished:
            rows = np.random.default_rng(seed).integers(400, size=(24, 32), dtype=np.int32)
            with text.directory.work() as (directory, _):
                writer = calibrate.ShardWriter(directory, 32)
                writer.add(rows)
                writer.close()
    if not learn.prior.finished:
        learn.prior.run()
    command = [sys.executable, "-c", WORKER, str(die_after), recipe_file, *overrides]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == code, done.stderr[-3000:]
    return plan


@pytest.fixture(scope="module")
def plan(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A finished run."""
    return learned(tiny, tmp_path_factory.mktemp("nested"), 0)


def _checkpoint(plan: Plan) -> Checkpoint:
    return plan.of(Learn)[0].read()


def test_masks_are_exact_and_what_is_kept_is_kept_at_every_lower_sparsity(plan: Plan) -> None:
    model = loading.load_model(plan.config.model)
    kept: dict[float, Any] = {}
    for sparsity in sorted(SPARSITIES):
        family = plan.of(Learn)[0].config.settings.family
        masks = learned_masks(_checkpoint(plan), prunable_linears(model), sparsity, family)
        kept[sparsity] = torch.cat([masks(name).flatten() for name in prunable_linears(model)])
        assert int((~kept[sparsity]).sum()) == round(sparsity * kept[sparsity].numel())
    assert not (kept[0.6] & ~kept[0.5]).any()
    assert not (kept[0.7] & ~kept[0.6]).any()


def test_each_sparsity_has_its_steps_its_multiplier_and_its_held_out_loss(plan: Plan) -> None:
    facts = _checkpoint(plan).facts
    assert len(facts["multipliers"]) == 3
    steps: list[int] = []
    for number, sparsity in enumerate(SPARSITIES):
        curves = training_curves(plan.of(Learn)[0], sparsity)
        steps += curves["step"]
        assert curves["target_density"] == 1 - sparsity
        assert curves["lagrangian"][-1] == facts["multipliers"][number]
        assert curves["masks"]["step"] == [0, 5, 10]
        # Gates that open at the cut keep about what is asked for, whatever the density that the logits started at.
        assert curves["density"][-1] == pytest.approx(1 - sparsity, abs=0.05)
    assert sorted(steps) == list(range(STEPS))
    last = facts["history"][-1]
    each = [last[f"mask_loss.hard-{sparsity:g}"] for sparsity in SPARSITIES]
    assert len(set(each)) == 3
    assert last["mask_loss.hard"] == pytest.approx(sum(each) / 3)


def test_a_killed_run_continues_bit_for_bit(plan: Plan, tiny: Path, tmp_path: Path) -> None:
    learned(tiny, tmp_path, 4, code=7)
    again = learned(tiny, tmp_path, 0)
    ours, theirs = _checkpoint(again), _checkpoint(plan)
    assert ours.facts["multipliers"] == theirs.facts["multipliers"]
    strip = [{k: v for k, v in step.items() if k != "seconds"} for step in ours.facts["history"]]
    assert strip == [{k: v for k, v in step.items() if k != "seconds"} for step in theirs.facts["history"]]
    for name in theirs.shapes:
        assert torch.equal(ours.logits(name), theirs.logits(name))
        assert torch.equal(ours.shard(name, "moments", 0, 1), theirs.shard(name, "moments", 0, 1))
    assert ours.step == STEPS


def test_masks_over_new_weights_are_exported_with_them(tiny: Path, tmp_path: Path) -> None:
    changes = ("learn.leap.settings.prior=admm", "learn.leap.settings.weights=prior")
    plan = learned(tiny, tmp_path, 0, changes=changes)
    config, artifact = plan.config, plan.of(Learn)[0].prior.read()
    dense = prunable_linears(loading.load_model(config.model))
    variant = next(v for v in plan.variants if v.method == "leap" and v.sparsity == 0.6)
    assert variant.export is not None
    variant.export.run()
    assert variant.export.read().weights_changed
    exported = loading.load_model(config.model, variant.export.read().directory)
    for name, linear in prunable_linears(exported).items():
        new = artifact.new_weight(name, dense[name].weight.detach())
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], new[kept])
    # What training saw of the hard mask is what the export computes.
    rows = torch.from_numpy(plan.corpus("heldout").read().take(0, 4))
    with torch.no_grad():
        losses = [float(output_losses(exported(input_ids=row[None]).logits, row[None])[0]) for row in rows]
    watched = _checkpoint(plan).facts["history"][-1]["mask_loss.hard-0.6"]
    assert sum(losses) / 4 == pytest.approx(watched, rel=1e-4)
