"""What a masked step on a GPU must not do inside backward: ask the device for a number, and wait for it.

No GPU is needed: the code that CUDA tensors take runs here on a CPU, and every number that is fetched is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from leap_kernels import adam8bit, output_losses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from leap import optimisers
from leap.engine import LocalEngine
from leap.gates import PriorMask
from leap.learner import MaskLearner
from leap.masked_linear import install_masks, logit_tensors
from leap.optimisers import Updater
from leap.settings import LearnSettings

ROWS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
SETTINGS = LearnSettings.published(
    steps=3, batch_rows=4, microbatch_rows=2, learning_rate=0.02, matrix_rate=0.01, distillation=0.3, seed=17, clip=0.0
)


class Fetches(TorchDispatchMode):
    """Counts the numbers that leave tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


class Toy(nn.Module):
    """Predicts the next token from the last alone. ids [R, S] → logits [R, S, 11]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 8)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU, whatever waits for it raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def learn(settings: LearnSettings, device: str = "cpu", strict: bool = False) -> tuple[list[Tensor], int]:
    """(the logits after all steps, numbers fetched inside backward); strict: raise an error where backward waits."""
    model, gate = Toy().to(device), settings.family.gate()
    state, layers = install_masks(model, gate)
    updater, fetches = Updater(settings), Fetches()
    for number, layer in enumerate(layers.values()):
        generator = torch.Generator().manual_seed(number)
        keep = torch.rand(layer.weight.shape, generator=generator) < 0.4
        first = gate.initial(layer.matrix.name, [PriorMask(layer.matrix, keep, keep.float())], generator)
        layer.provide([nn.Parameter(first.to(device, updater.optimiser.dtype))])
    logits = list(logit_tensors(layers).values())
    engine = LocalEngine(model, state, layers, updater)
    learner = MaskLearner(engine, settings, [0.4])
    for step in range(settings.steps):
        for number, batch in enumerate(ROWS.to(device).split(settings.microbatch_rows)):
            loss = learner.loss(batch, step, number)
            updater.begin(step, settings.learning_rate, number, settings.microbatches)
            with fetches, no_waiting() if strict else nullcontext():
                loss.backward()
    return [matrix.detach().float() for matrix in logits], fetches.count


@pytest.mark.parametrize("optimiser", ["adam", "adam8bit", "adam8bit-bf16"])
def test_no_number_is_fetched_inside_backward(optimiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, optimiser=optimiser)
    # Native code takes numbers, which a CPU has at hand.
    monkeypatch.setattr(output_losses, "native_library", lambda: None)
    monkeypatch.setattr(adam8bit, "native_library", lambda: None)
    expected, fetched = learn(settings)
    assert fetched == settings.steps * 4, "the sum of each matrix, and nothing else, or the count counts nothing"
    monkeypatch.setattr(optimisers, "_is_waited_for", lambda _: True)
    ours, fetched = learn(settings)
    assert fetched == 0
    for matrix, same in zip(ours, expected, strict=True):
        torch.testing.assert_close(matrix, same, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimiser", ["adam", "adam8bit", "adam8bit-bf16"])
def test_backward_on_a_gpu_waits_for_nothing(optimiser: Any) -> None:
    settings = replace(SETTINGS, optimiser=optimiser)
    learn(settings, "cuda")  # what is compiled or set up at first use may wait
    ours, fetched = learn(settings, "cuda", strict=True)
    assert fetched == 0
    assert all(matrix.isfinite().all() for matrix in ours)
