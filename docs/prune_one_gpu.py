"""Prune a model of about a billion parameters on one GPU, and keep what was learned in a directory of its own.

    python docs/prune_one_gpu.py --model meta-llama/Llama-3.2-1B --text texts/*.txt --sparsity 0.5 --out pruned

With the defaults this learns from 20 million tokens. A 1B model in bfloat16 takes 2 GB for itself, 6 GB for logits and
their optimiser, 4 GB for gradients, and activations: a GPU with 24 GB does. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import leap


def documents(files: list[Path]) -> list[str]:
    """The texts in the files; blank lines stand between them."""
    return [text for file in files for text in file.read_text(encoding="utf-8").split("\n\n\n") if text.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or name on the hub")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="files, two blank lines between documents")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="to learn from")
    parser.add_argument("--row-length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--out", type=Path, default=Path("pruned"))
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(device)
    texts = documents(given.text)
    heldout, calibration = texts[::20], [text for number, text in enumerate(texts) if number % 20]
    result = leap.prune(
        model,
        calibration,
        sparsity=given.sparsity,
        tokens=given.tokens,
        heldout=heldout,
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        row_length=given.row_length,
    )
    result.save(given.out)
    print(f"perplexity {result.perplexity['dense']:.2f} dense, {result.perplexity['pruned']:.2f} pruned")

    written = leap.write_sparse(given.out, f"{given.out}-packed")
    print(f"{given.out}: dense with zeros, for any engine")
    print(f"{given.out}-packed: {written['bytes'] / 1e6:.0f} MB, for transformers after import leap")
    packed = AutoModelForCausalLM.from_pretrained(f"{given.out}-packed").to(device)
    prompt = result.tokenizer(texts[0][:200], return_tensors="pt").to(device)
    print(result.tokenizer.decode(packed.generate(**prompt, max_new_tokens=32)[0]))


if __name__ == "__main__":
    main()
