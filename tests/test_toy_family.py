"""A family of masks that the project does not know: this file alone makes it learn, harden, export and pack.

It removes units: output rows of a matrix, and channels of an MLP, whose one logit tensor three matrices read. The
matrix after the channels reads two tensors, one for its rows and one for its columns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import leap
from leap.families import MaskFamily
from leap.gates import Draw, Layout, Logits, Matrix, PriorMask
from leap.settings import LearnSettings
from pipeline.config import recipe
from pipeline.config.sections import RunConfig
from pipeline.execution.plan import make_plan
from pipeline.model import loading
from pipeline.model.sizes import measure
from pipeline.stages import calibrate
from pipeline.stages.cost import Machine
from pipeline.stages.harden import Harden
from pipeline.stages.learn import Learn

SPARSITY = 0.4


@dataclass(frozen=True, kw_only=True)
class Toy(MaskFamily):
    kind: Literal["toy"] = "toy"
    temperature: float = 0.5

    @property
    def pattern_name(self) -> str:
        return "units"

    def gate(self) -> ToyGate:
        return ToyGate(self)


class ToyGate:
    """M = Π σ(P / τ) over the tensors that the matrix reads, each along its side."""

    def __init__(self, settings: Toy) -> None:
        self.settings = settings

    def logit_shapes(self, matrix: Matrix) -> dict[str, torch.Size]:
        rows, columns = (torch.Size([side]) for side in matrix.shape)
        mlp, _, layer = matrix.name.rpartition(".")
        if layer in ("gate_proj", "up_proj"):
            return {f"{mlp}.channels": rows}
        own = {f"{matrix.name}.rows": rows}
        return own | {f"{mlp}.channels": columns} if layer == "down_proj" else own

    def initial(self, name: str, priors: Sequence[PriorMask], generator: torch.Generator) -> Tensor:
        kept = [
            # Channels are the columns of one of their readers, the rows of the others.
            keep.float().mean(0 if name.endswith(".channels") and matrix.name.endswith("down_proj") else 1)
            for matrix, keep, _ in priors
        ]
        return torch.stack(kept).mean(0) + torch.randn(kept[0].shape, generator=generator) * 0.01

    def draw(self, progress: float, seed: int, index: int) -> Draw:  # noqa: ARG002
        return Draw(1.0, self.settings.temperature, False, seed, index)

    def _soft(self, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        mask = torch.ones(matrix.shape)
        for side, tensor in zip((1, 0), logits, strict=False):
            mask = mask * torch.sigmoid(tensor.float() / draw.temperature).unsqueeze(side)
        return mask

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        mask = self._soft(logits, matrix, draw)
        out.copy_(mask * weight)
        return self._sums(mask, weight)

    @staticmethod
    def _sums(mask: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([mask.double().sum(), (mask * weight).double().square().sum(), mask.double().sum()])

    def backward(
        self,
        grad_masked: Tensor,
        weight: Tensor,
        logits: Sequence[Tensor],
        stats_grad: Tensor,
        matrix: Matrix,
        draw: Draw,
    ) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in logits]
        with torch.enable_grad():
            mask = self._soft(leaves, matrix, draw)
            total = (mask * weight.detach() * grad_masked).sum() + (self._sums(mask, weight.detach()) @ stats_grad)
        return torch.autograd.grad(total, leaves)

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        return weight * self._soft(logits, matrix, draw)

    def norm(self, squares: Tensor, total: float) -> Tensor:
        return squares.sum() / total

    def hardener(
        self,
        layout: Layout,
        logits: Logits,
        sparsity: float,
        reduce: Callable[[Tensor], Tensor],
        exact: bool,  # noqa: ARG002
    ) -> ToyHardener:
        """One threshold for all units, as low as the sparsity allows."""
        total = sum(matrix.shape.numel() for matrix in layout.matrices)
        low, high = -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            opened = reduce(torch.stack([(tensor > middle).sum() for _, tensor in logits()]))
            units = dict(zip(layout.shapes, opened.tolist(), strict=True))
            kept = 0
            for matrix in layout.matrices:
                rows, *columns = (units[name] for name in layout.reads[matrix.name])
                kept += rows * (columns[0] if columns else matrix.shape[1])
            low, high = (low, middle) if kept <= (1 - sparsity) * total else (middle, high)
        return ToyHardener(high)


@dataclass(frozen=True)
class ToyHardener:
    offset: float

    def mask(self, matrix: Matrix, logits: Sequence[Tensor]) -> Tensor:
        mask = torch.ones(matrix.shape, dtype=torch.bool)
        for side, tensor in zip((1, 0), logits, strict=False):
            mask &= (tensor.detach() > self.offset).unsqueeze(side)
        return mask


SETTINGS = LearnSettings(
    family=Toy(), steps=25, batch_rows=4, microbatch_rows=2, prior="wanda", learning_rate=0.1, distillation=1.0
)


def check_units(model: PreTrainedModel) -> None:
    """What is zero are whole units, the same in all that read them, and not one unit more than has to be."""
    channels = 0
    for block in model.model.layers:
        mlp = block.mlp
        removed = (mlp.gate_proj.weight == 0).all(1)
        assert torch.equal(removed, (mlp.up_proj.weight == 0).all(1))
        assert not mlp.down_proj.weight[:, removed].any()
        channels += int(removed.sum())
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                left = module.weight[(module.weight != 0).any(1)][:, (module.weight != 0).any(0)]
                assert (left != 0).all(), name
    assert channels > 0
    zero, numel = leap.zeros(model)
    # A unit is at most a channel, read by three matrices, or a row.
    assert 0 <= zero - SPARSITY * numel < 3 * max(model.config.hidden_size, model.config.intermediate_size)


@pytest.fixture(scope="module")
def result(tiny: Path) -> leap.PruneResult:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    rows = torch.randint(400, (8, 24), generator=torch.Generator().manual_seed(3))
    return leap.prune(model, rows, sparsity=SPARSITY, settings=SETTINGS)


def test_it_learns_and_hardens(result: leap.PruneResult) -> None:
    gaps = [abs(step["density"] - (1 - SPARSITY)) for step in result.history]
    assert gaps[-1] < 0.06 < gaps[0]
    check_units(result.model)


def test_the_gradient_of_a_shared_tensor_is_the_sum_over_its_readers() -> None:
    gate, shape = Toy().gate(), torch.Size([5, 5])
    names = [f"a.mlp.{layer}" for layer in ("gate_proj", "up_proj", "down_proj")]
    layout = Layout.of(gate, [Matrix(number, name, shape) for number, name in enumerate(names)])
    assert layout.shapes == {"a.mlp.channels": (5,), "a.mlp.down_proj.rows": (5,)}
    assert [matrix.name for matrix in layout.readers["a.mlp.channels"]] == names
    assert layout.numel == 10
    with pytest.raises(ValueError, match=r"a\.mlp\.up_proj reads a\.mlp\.channels as \[6\], others as \[5\]"):
        Layout.of(gate, [Matrix(0, names[0], shape), Matrix(1, names[1], torch.Size([6, 5]))])


def test_it_exports_and_packs(result: leap.PruneResult, tmp_path: Path) -> None:
    result.export(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    check_units(plain)
    masks = leap.MaskFile(tmp_path / "dense")
    assert masks.about["pattern"] == "units"
    for name, mask in masks.items():
        assert torch.equal(mask, plain.get_submodule(name).weight != 0)
    leap.write_sparse(tmp_path / "dense", tmp_path / "sparse")
    packed = leap.load_sparse(tmp_path / "sparse")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


#: A worker of a learning run of the toy, in a process of its own; the arguments: the recipe and its overrides.
WORKER = """
import sys
from types import SimpleNamespace
import ray.train
import torch.distributed as dist
from pipeline.learning import worker
from test_toy_family import planned

dist.init_process_group("gloo")
ray.train.report = lambda metrics: None
ray.get = lambda sent: None
job = planned(sys.argv[1], sys.argv[2:])[1].job(SimpleNamespace(push=SimpleNamespace(remote=lambda event: None)))
worker.train_loop({"job": job})
"""


def planned(recipe_file: str, overrides: list[str]) -> tuple[RunConfig, Learn]:
    """The configuration of a recipe, and its learning run with the toy in place of its masks."""
    plan = make_plan(recipe.load(recipe_file, overrides))
    (learn,) = plan.of(Learn)
    entry = learn.config.model_copy(update={"settings": replace(SETTINGS, microbatch_rows=1)})
    return plan.config, replace(learn, config=entry)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # it knows the project's own families alone
def test_two_workers_learn_it_and_the_stages_export_it(tiny: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", f"sparsities=[{SPARSITY}]", "evaluate.cloze=null"]
    overrides += ["learn.leap.workers=2", "learn.leap.settings.prior=wanda"]
    config, learn = planned(str(tiny / "tiny.yaml"), overrides)
    for seed, text in enumerate((learn.calibration, learn.heldout)):
        rows = np.random.default_rng(seed).integers(400, size=(24, 32), dtype=np.int32)
        with text.directory.work() as (directory, _):
            writer = calibrate.ShardWriter(directory, 32)
            writer.add(rows)
            writer.close()
    learn.prior.run()
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000), "WORLD_SIZE": "2"}
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tiny / "tiny.yaml"), *overrides],
            env=os.environ | group | paths | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in workers:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]

    checkpoint, sizes = learn.read(), measure(config)
    layout = sizes.layout(Toy())
    assert checkpoint.shapes == {name: list(shape) for name, shape in layout.shapes.items()}
    assert checkpoint.facts["history"][-1]["density"] == pytest.approx(1 - SPARSITY, abs=0.1)
    cost = learn.cost(sizes, Machine(cpu=1e9, gpus=False))
    assert cost.disk == 36 * layout.numel
    assert cost.memory[f"mask logits and {SETTINGS.optimiser}"] == layout.numel * 6 / 2
    assert cost.memory["gradient held to the end of a step"] == layout.numel * 4 / 2

    export = Harden(learn.store, learn.model, "toy", None, SPARSITY, learn)
    export.run()
    assert export.facts["pattern"] == "units"
    check_units(loading.load_model(config.model, export.read().directory))
