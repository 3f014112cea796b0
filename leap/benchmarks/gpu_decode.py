"""Decoding on a GPU, a dense model against the same with packed layers: eager, and as a replayed graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from leap_kernels import BMP128, SparseLinear, pack
from leap_kernels.benchmarks.checkrun import CheckRun
from leap_kernels.benchmarks.graph_timing import event_seconds, synchronize
from leap_kernels.benchmarks.matrices import copied
from leap_kernels.idx8 import IDX8
from transformers import PreTrainedModel, StaticCache

from leap.benchmarks.shapes import SHAPES, Shape, random_model
from leap.sparse_model import packed_linear
from leap.surgery import prunable_linears

_PROMPT = 16


def decoding(run: CheckRun) -> None:
    """Tokens a second of 1B and 8B shapes, dense and packed at 50 and 60 %, batch 1 and 16."""
    whole_8b = run.device.type == "cuda" and torch.cuda.get_device_properties(run.device).total_memory > 100e9
    shapes: tuple[tuple[Shape, int | None], ...] = (("llama-1b", None), ("llama-8b", None if whole_8b else 8))
    for shape, blocks in run.affordable(run.pick(shapes, (("smoke", None),)), str):
        for sparsity in run.affordable((None, 0.6, 0.5), str):
            with run.guarded(f"decode {shape} {sparsity or 'dense'}"):
                _one_model(run, shape, blocks, sparsity)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def _one_model(run: CheckRun, shape: Shape, blocks: int | None, sparsity: float | None) -> None:
    model = random_model(shape, torch.bfloat16, run.device, blocks)
    dense_bytes = _held_bytes(model)
    if sparsity is not None:
        pack_at_random(model, sparsity)
    held = _held_bytes(model)
    for batch in (1, 16):
        name = f"decode {shape} {'dense' if sparsity is None else f'{sparsity:.0%}'} batch {batch}"
        about = {"blocks": model.config.num_hidden_layers, "of": SHAPES[shape]["num_hidden_layers"]}
        about |= {"model_bytes": held, "dense_bytes": dense_bytes, "format": _format(model)}
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = decode_step(model, batch)
        eager = event_seconds(step, run.device, run.pick(20, 2))
        if run.device.type == "cuda":
            about["peak_bytes"] = torch.cuda.max_memory_allocated()
        run.figure(
            f"{name}, eager", ms=1e3 * eager[len(eager) // 2], tokens_per_s=batch / eager[len(eager) // 2], **about
        )
        if run.device.type == "cuda":
            with run.guarded(f"{name}, graph"):
                replay = _captured(step)
                seconds = event_seconds(replay, run.device, 40)
                median = seconds[len(seconds) // 2]
                run.figure(f"{name}, graph", ms=1e3 * median, tokens_per_s=batch / median, **about)


def decode_step(model: PreTrainedModel, batch: int) -> Callable[[], None]:
    """A step that puts each sequence's next token in place of the last one.

    The cache holds keys and values of a fixed length, so that the step can be captured and replayed.
    """
    cache = StaticCache(config=model.config, max_cache_len=_PROMPT + 240)
    prompt = torch.randint(model.config.vocab_size, (batch, _PROMPT), device=model.device)
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step() -> None:
        found = model(token, past_key_values=cache, use_cache=True)
        token.copy_(found.logits[:, -1:].argmax(-1))

    return step


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def pack_at_random(model: PreTrainedModel, sparsity: float) -> None:
    """Replace the prunable layers by packed ones under random masks.

    Layers of one shape hold copies of one packed matrix, since packing each would take longer than all measurements.
    """
    packed: dict[torch.Size, BMP128 | IDX8] = {}
    for name, linear in prunable_linears(model).items():
        weight, shape = linear.weight.detach(), linear.weight.shape
        if shape not in packed:
            layer = packed_linear(pack(weight, torch.rand(shape, device=weight.device) >= sparsity), None)
            packed[shape] = layer.weight
        model.set_submodule(name, SparseLinear(copied(packed[shape]), linear.bias))
    synchronize(model.device)


def _format(model: PreTrainedModel) -> str:
    formats = {module.matrix_format for module in model.modules() if isinstance(module, SparseLinear)}
    return ", ".join(sorted(formats)) or "dense"


def _held_bytes(model: PreTrainedModel) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
