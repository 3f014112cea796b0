"""Tokens a second of the calibration stage with one and two parallel tokenisers.

    python pipeline/benchmarks/calibration.py --tokens 150000 --repeats 3

The embedded text is parsed before the clock starts; what is timed is tokenising, packing and writing Parquet. The first
round starts the worker processes and does not count; the rounds are interleaved.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from pipeline.config import CorpusConfig, DataConfig, ModelConfig
from pipeline.execution.ray_cluster import start_ray
from pipeline.nano.corpus import SPLITS
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.stage import PinnedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    start_ray()
    corpus = CorpusConfig(share=SPLITS["calibration"], tokens=args.tokens)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(args.repeats + 1):
            for workers, seen in rates.items():
                text = Calibrate(
                    store=f"{directory}/{workers}-{repeat}",
                    role="calibration",
                    section="data.calibration",
                    corpus=corpus,
                    content=None,
                    data=DataConfig(tokenizer_workers=workers),
                    model=PinnedModel(ModelConfig(source=args.model), ""),
                    apart=(),
                    keep_texts=False,
                )
                text.run()
                if repeat:
                    seen.append(text.facts["tokens_per_second"])
    for workers, seen in rates.items():
        spread = f"{min(seen):,.0f} to {max(seen):,.0f}"
        print(f"{workers} workers: median {statistics.median(seen):,.0f} tokens/s ({spread})")


if __name__ == "__main__":
    main()
