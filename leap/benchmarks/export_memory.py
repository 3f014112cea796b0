"""What an export takes of a full-size model: seconds, processor time and peak memory, on random weights and masks.

    python -m leap.benchmarks.export_memory --shape llama-8b --folder DIR

The folder needs three times the model's size; it is emptied of what was made there. Memory is what the process has
allocated, sampled; files that are mapped do not count, for the system takes their pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from leap.benchmarks.shapes import SHAPES, Shape
from leap.checkpoint import Checkpoint, meta_model
from leap.sparse_checkpoint import write_sparse
from leap.stream_export import StreamExport, stored_zeros
from leap.surgery import prunable_linears
from leap.tensor_file import write_tensors
from leap.weight_index import write_index

DTYPE = torch.bfloat16
#: Tensors of a file of the random model.
PER_FILE = 60


def make(shape: Shape, folder: Path) -> None:
    """Write a Llama of this shape with normal weights."""
    config = LlamaConfig(**SHAPES[shape], dtype=DTYPE, architectures=["LlamaForCausalLM"])
    model = meta_model(config, shape)
    specs = {name: (DTYPE, parameter.shape) for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    names = list(specs)
    files: dict[str, str] = {}
    for first in range(0, len(names), PER_FILE):
        part = names[first : first + PER_FILE]
        file = f"model-{first:05d}.safetensors"
        write_tensors(folder / file, {name: specs[name] for name in part}, lambda name: _normal(specs[name][1]))
        files |= dict.fromkeys(part, file)
    write_index(folder, files, sum(s.numel() * d.itemsize for d, s in specs.values()))


def _normal(shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=DTYPE).normal_(std=0.02)


def _allocated() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@contextmanager
def measured(step: str) -> Iterator[dict[str, float]]:
    """Prints, as a JSON line, what a step took beyond what the process had before."""
    before, peak, done = _allocated(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _allocated())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    facts: dict[str, float] = {}
    yield facts
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    done.set()
    thread.join()
    spent = used.ru_utime - cpu.ru_utime + used.ru_stime - cpu.ru_stime
    row = {"step": step, "seconds": round(seconds, 1), "processor_seconds": round(spent, 1)}
    print(json.dumps(row | {"peak_gb": round(max(0, peak - before) / 1e9, 3)} | facts), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Make, export, count and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b")
    parser.add_argument("--folder", type=Path, required=True, help="a directory for the models")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    dense, pruned, packed = (args.folder / name for name in ("dense", "pruned", "packed"))
    try:
        with measured("make"):
            make(args.shape, dense)
        with measured("open") as facts:
            checkpoint = Checkpoint(dense)
            layers = prunable_linears(meta_model(checkpoint.config, args.shape))
            facts["prunable"] = sum(linear.weight.numel() for linear in layers.values())
        shapes = [linear.weight.shape for linear in layers.values()]

        def mask(number: int, _: str) -> tuple[Tensor, None]:
            generator = torch.Generator().manual_seed(number)
            return torch.empty(shapes[number], dtype=torch.uint8).random_(0, 2, generator=generator).bool(), None

        with measured("export") as facts, StreamExport(checkpoint, DTYPE) as export:
            assert export.possible
            export.write(None, mask, pruned, {"method": "random"})
            facts["gb"] = _size(pruned)
        shutil.rmtree(dense)
        with measured("count zeros") as facts:
            zero, numel = stored_zeros(Checkpoint(pruned))
            facts["sparsity"] = zero / numel
        with measured("pack") as facts:
            write_sparse(pruned, packed)
            facts["gb"] = _size(packed)
    finally:
        for folder in (dense, pruned, packed):
            shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e9, 3)


if __name__ == "__main__":
    main()
