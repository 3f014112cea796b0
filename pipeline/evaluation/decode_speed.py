"""Tokens per second of batch-1 decoding, a dense model against the same model with packed layers."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from leap_kernels.benchmarks.timing import clock
from torch import Tensor, nn
from transformers import PreTrainedModel

from leap.packed import MaskFile
from leap.sparse_model import sparsify
from leap.surgery import prunable_linears
from pipeline.evaluation.speed import DecodeSpeed

PROMPT_TOKENS = 16


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Tensor, tokens: int) -> list[float]:
    """Greedy decoding after ``prompt`` [1, S]; seconds of each of ``tokens`` steps, the prompt's not counted."""
    now = clock(model.device.type)
    state = model(prompt, use_cache=True)
    seconds = []
    for _ in range(tokens):
        start = now()
        chosen = state.logits[:, -1:].argmax(-1)
        state = model(chosen, past_key_values=state.past_key_values, use_cache=True)
        seconds.append(now() - start)
    return seconds


def compare(dense: PreTrainedModel, sparse: PreTrainedModel, tokens: int, rounds: int) -> DecodeSpeed:
    """Both models in turn, ``rounds`` times ``tokens`` tokens each.

    Returns:
        By ``dense`` and ``sparse``: ``tokens_per_second`` and the median milliseconds of a token (``token_ms``), with
        its parts ``linears_ms`` (the packed layers), ``head_ms`` (the output head) and ``rest_ms``. ``speedup``: median
        over the rounds of the ratio of tokens per second; ``speedup_low`` and ``speedup_high``: its range;
        ``speedup_without_head``: what it would be if the output head, dense in both, took no time. On a GPU
        ``peak_bytes`` too, the most memory that decoding with each model took, the other one's weights not counted.
    """
    vocabulary = dense.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(dense.device)
    both = {"dense": dense, "sparse": sparse}
    for model in both.values():
        decode(model, prompt, 2)
    times: dict[str, list[list[float]]] = {name: [] for name in both}
    for number in range(rounds):
        for name in sorted(both, reverse=bool(number % 2)):
            times[name].append(decode(both[name], prompt, tokens))
    ratios = [sum(d) / sum(s) for d, s in zip(times["dense"], times["sparse"], strict=True)]
    result: dict[str, Any] = {
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
    }
    for name, model in both.items():
        token = statistics.median(second for run in times[name] for second in run)
        linears = [model.get_submodule(layer) for layer in prunable_linears(dense)]
        parts = {"linears_ms": linears, "head_ms": [model.get_output_embeddings()]}
        shares = {part: _milliseconds(model, modules, prompt, tokens) for part, modules in parts.items()}
        rest = max(0.0, 1e3 * token - sum(shares.values()))
        result[name] = {"tokens_per_second": 1 / token, "token_ms": 1e3 * token, **shares, "rest_ms": rest}
        if model.device.type == "cuda":
            result[name]["peak_bytes"] = _peak_bytes(model, prompt, tokens)
    without = [result[name]["token_ms"] - result[name]["head_ms"] for name in both]
    return cast(DecodeSpeed, result | {"speedup_without_head": without[0] / without[1]})


def _peak_bytes(model: PreTrainedModel, prompt: Tensor, tokens: int) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    own = {storage.data_ptr(): storage.nbytes() for storage in storages}  # tied tensors once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode(model, prompt, tokens)
    return sum(own.values()) + torch.cuda.max_memory_allocated() - before


def _milliseconds(model: PreTrainedModel, modules: list[nn.Module], prompt: Tensor, tokens: int) -> float:
    """Milliseconds a token that ``modules`` take. Timing them costs time too, so the token itself is timed without."""
    now = clock(model.device.type)
    spent = 0.0

    def timed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            nonlocal spent
            start = now()
            y = forward(x)
            spent += now() - start if x.shape[-2] == 1 else 0  # decoding, not the prompt
            return y

        return call

    for module in modules:
        module.forward = timed(module.forward)
    try:
        decode(model, prompt, tokens)
    finally:
        for module in modules:
            del module.forward
    return 1e3 * spent / tokens


def packed_copy(dense: PreTrainedModel, masks: MaskFile | None = None) -> PreTrainedModel:
    """A sparse copy that shares embeddings and head with ``dense``, and holds no second copy of a dense layer."""
    memo = {id(parameter): parameter for parameter in dense.parameters()}
    sparse = copy.deepcopy(dense, memo)
    sparsify(sparse, masks)
    return sparse
