"""Train the embedded model ``nano`` from scratch: tokenizer, weights and its report card.

    python pipeline/nano/train.py --out pipeline/nano/model --tokens 64e6

Everything it reads ships with the Python installation (see ``corpus.py``); about an hour on two cores. The run
continues from ``--out``/checkpoint.safetensors when it is started again after an interruption. ``--card-only``
measures an existing model again. The report card (``card.json``) holds perplexity on held-out text for the model, and
for a unigram and an interpolated trigram model fitted to the same training tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.nano import corpus

VOCAB = 2048
CONTEXT = 256
EOS = "<|endoftext|>"
SEED = 20


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One token stream, each document followed by the end-of-text token. uint16 [tokens]."""
    eos = tokenizer.eos_token_id
    batches = (tokenizer(texts[i : i + 1000])["input_ids"] for i in range(0, len(texts), 1000))
    return np.concatenate([np.array([*ids, eos], dtype=np.uint16) for batch in batches for ids in batch])


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 1 % of the steps, then linear decay to zero (Defazio et al. 2023, arXiv 2310.07831)."""
    warmup = max(1, steps // 100)
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


def train(model: LlamaForCausalLM, stream: np.ndarray, tokens: int, batch: int, peak: float, out: Path) -> None:
    steps = tokens // (batch * CONTEXT)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    resume = out / "checkpoint.safetensors"
    start = 0
    if resume.exists():
        state = load_file(resume)
        start = int(state.pop("step"))
        model.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("p.")})
        for name, p in model.named_parameters():
            optimiser.state[p] = {
                "step": torch.tensor(float(start)),
                "exp_avg": state[f"m.{name}"],
                "exp_avg_sq": state[f"v.{name}"],
            }
    compiled = torch.compile(model)
    began, loss_mean = time.time(), 0.0
    data = torch.from_numpy(stream.astype(np.int64))
    for step in range(start, steps):
        # The offset of every row follows from (seed, step), so an interrupted run reads the same rows.
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        at = torch.randint(0, len(data) - CONTEXT - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + CONTEXT + 1] for i in at])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        loss_mean = float(loss) if step == start else 0.98 * loss_mean + 0.02 * float(loss)
        if step % 50 == 0 or step == steps - 1:
            rate = (step - start + 1) * batch * CONTEXT / (time.time() - began)
            left = (steps - step - 1) * batch * CONTEXT / rate / 60
            print(
                f"step {step:6d}/{steps}  loss {loss_mean:.4f}  {rate:8.0f} tokens/s  {left:5.1f} min left", flush=True
            )
        if (step + 1) % 500 == 0:
            state = {f"p.{n}": p.detach() for n, p in model.named_parameters()}
            for name, p in model.named_parameters():
                state |= {f"m.{name}": optimiser.state[p]["exp_avg"], f"v.{name}": optimiser.state[p]["exp_avg_sq"]}
            save_file(state | {"step": torch.tensor(step + 1)}, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").rename(resume)
    resume.unlink(missing_ok=True)


def unigram_perplexity(train_stream: np.ndarray, test: np.ndarray) -> float:
    """Add-one smoothed token frequencies."""
    counts = np.bincount(train_stream, minlength=VOCAB) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[test].mean()))


def trigram_perplexity(train_stream: np.ndarray, test: np.ndarray) -> float:
    """Interpolated trigram with Witten-Bell weights (Chen & Goodman 1998, section 2.4).

    p(w | uv) = (c(uvw) + T(uv)·p(w | v)) / (c(uv) + T(uv)) with T the number of distinct followers, and the same one
    order down; the unigram is add-one smoothed.
    """

    def keys(stream: np.ndarray, order: int) -> np.ndarray:
        s = stream.astype(np.int64)
        key = s[: len(s) - order + 1].copy()
        for i in range(1, order):
            key = key * VOCAB + s[i : len(s) - order + 1 + i]
        return key

    def lookup(table: tuple[np.ndarray, np.ndarray], wanted: np.ndarray) -> np.ndarray:
        values, counts = table
        at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
        return np.where(values[at] == wanted, counts[at], 0).astype(np.float64)

    counts = np.bincount(train_stream, minlength=VOCAB) + 1.0
    p = (counts / counts.sum())[test[2:]]
    for order in (2, 3):
        grams = np.unique(keys(train_stream, order), return_counts=True)
        followers = np.unique(grams[0] // VOCAB, return_counts=True)
        seen = np.unique(keys(train_stream[:-1], order - 1), return_counts=True)
        wanted = keys(test, order)[3 - order :]
        c, context, kinds = lookup(grams, wanted), lookup(seen, wanted // VOCAB), lookup(followers, wanted // VOCAB)
        p = np.where(context > 0, (c + kinds * p) / np.maximum(context + kinds, 1), p)
    return float(np.exp(-np.log(p).mean()))


@torch.no_grad()
def model_perplexity(model: LlamaForCausalLM, test: np.ndarray) -> float:
    rows = torch.from_numpy(test[: len(test) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    total = count = 0.0
    for chunk in rows.split(32):
        logits = model(input_ids=chunk).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, chunk[:, 1:].flatten(), reduction="sum"))
        count += chunk[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--tokens", type=float, default=64e6, help="training tokens")
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--card-only", action="store_true", help="measure the model in --out, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    texts = list(corpus.documents("train", packages=None))
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = build_tokenizer(texts)
        tokenizer.save_pretrained(args.out)
    stream = encode(tokenizer, texts)
    print(f"{len(texts)} documents, {len(stream)} tokens", flush=True)

    if args.card_only:
        model = LlamaForCausalLM.from_pretrained(args.out)
    else:
        model = build_model()
        print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
        train(model, stream, int(args.tokens), args.batch, args.lr, args.out)
        model.save_pretrained(args.out)

    heldout = encode(tokenizer, list(corpus.documents("heldout", packages=None)))
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_documents": len(texts),
        "distinct_training_tokens": len(stream),
        "training_tokens": int(args.tokens),
        "heldout_tokens": len(heldout),
        "heldout_perplexity": {
            "unigram": unigram_perplexity(stream, heldout),
            "trigram": trigram_perplexity(stream, heldout),
            "nano": model_perplexity(model, heldout),
        },
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
