"""What is counted before a run is what calibration takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from conftest import sentences

from pipeline.config import CorpusConfig, ModelConfig
from pipeline.data import local_files
from pipeline.model.loading import load_tokenizer


def test_counting_stops_where_there_is_enough(tiny: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    corpus = CorpusConfig(source=str(tiny / "text.jsonl"))
    everything = local_files.count([corpus.source], corpus, tokenizer, 10**9)
    assert everything.documents == len(everything.hashes) == 400
    first = local_files.count([corpus.source], corpus, tokenizer, 1)
    assert first.documents == 1
    assert 1 <= first.tokens < everything.tokens
    others = local_files.count([corpus.source], corpus, tokenizer, 10**9, first.hashes)
    assert others.documents == 399
    assert others.tokens == everything.tokens - first.tokens


def test_one_document_of_many_megabytes_is_not_counted_to_its_end(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    text = " ".join(sentences(seed, 12) for seed in range(400)) * 60
    assert len(text) > 12 * 2**20
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    began = time.process_time()
    found = local_files.count([str(tmp_path / "long.jsonl")], CorpusConfig(), tokenizer, 4096)
    assert time.process_time() - began < 10  # whole, it takes minutes
    assert found.documents == 1
    assert found.tokens > 4096
