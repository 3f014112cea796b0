"""GGUF files as users have them: in one piece, split, in a package, with tokenizers of several families."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model import write_gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap.checkpoint import CheckpointError
from pipeline.errors import UserError
from pipeline.model import gguf_files
from pipeline.model.gguf_tokenizer import _CUTS, SAMPLES, GgufVocabulary, check_tokenizer

TEXTS = [
    *SAMPLES,
    "the the then this that 12 123 1234 2024 10.50",
    "names and values of a function",
    "it's I'll we've",
] * 3


@functools.cache
def byte_level(rule: str) -> tuple[dict[str, Any], Tokenizer]:
    """Vocabulary and merges trained on texts that are cut by a rule of llama.cpp, and the tokenizer itself."""
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in _CUTS[rule]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    stored = {"model": "gpt2", "pre": rule, "tokens": tokens, "token_type": types, "merges": merges}
    return stored | {"bos_token_id": 0, "eos_token_id": 0}, tokenizer


def by_score() -> dict[str, Any]:
    """A vocabulary of SentencePiece: bytes, letters, and words with scores that fall with their place."""
    words = [
        "\u2581the",
        "\u2581th",
        "he",
        "th",
        "\u2581t",
        "in",
        "an",
        "and",
        "\u2581and",
        "\u2581\u2581",
        "er",
        "ing",
    ]
    letters = sorted({letter for text in SAMPLES for letter in text if letter.isascii() and letter.isalnum()})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "\u2581", *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))] + [-100.0 - n for n in range(len(letters) + 1)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    stored = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
    return stored | {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_reference_cuts_and_merges_as_the_tokenizer_that_was_written(rule: str, tmp_path: Path) -> None:
    stored, tokenizer = byte_level(rule)
    vocabulary = GgufVocabulary(write_gguf(tmp_path / "m.gguf", stored))
    for text in SAMPLES:
        assert vocabulary.encode(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2"])
def test_a_converted_tokenizer_is_the_files_own(rule: str, tmp_path: Path) -> None:
    stored, tokenizer = byte_level(rule)
    (tmp_path / "out").mkdir()
    gguf_files.convert([write_gguf(tmp_path / "m.gguf", stored)], tmp_path / "out")
    converted = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in SAMPLES:
        assert converted(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_tokenizer_that_is_another_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", byte_level("smollm")[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")  # as it is: without the splitter of digits
    with pytest.raises(CheckpointError, match=r"m\.gguf: the tokenizer .*\(gpt2, smollm\) cuts texts otherwise"):
        check_tokenizer(tokenizer, file)


def test_merging_by_score(tmp_path: Path) -> None:
    vocabulary = GgufVocabulary(write_gguf(tmp_path / "m.gguf", by_score()))
    tokens = vocabulary.tokens
    assert [tokens[n] for n in vocabulary.encode("the and") or []] == ["\u2581the", "\u2581and"]
    assert [tokens[n] for n in vocabulary.encode("thé") or []] == ["\u2581th", "<0xC3>", "<0xA9>"]


def test_a_rule_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", byte_level("gpt-2")[0] | {"pre": "brand-new"})
    assert check_tokenizer(AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), file) is False


def state_of(files: list[Path], directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    gguf_files.convert(files, directory)
    assert sorted(path.name for path in directory.glob("*.gguf")) == []
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_split_files_and_chunks_are_the_same_model(tmp_path: Path) -> None:
    stored = byte_level("qwen2")[0]
    whole = write_gguf(tmp_path / "whole.gguf", stored)
    write_gguf(tmp_path / "split.gguf", stored, split=8)
    first = tmp_path / "split-00001-of-00003.gguf"
    assert len(gguf_files.of_path(first)) == 3
    content = whole.read_bytes()
    chunks = [tmp_path / f"whole.gguf.part0{n}" for n in range(3)]
    for n, chunk in enumerate(chunks):
        chunk.write_bytes(content[n * 40_000 : (n + 1) * 40_000 if n < 2 else None])
    expected = state_of([whole], tmp_path / "a")
    for name, files in (("b", gguf_files.of_path(first)), ("c", chunks)):
        state = state_of(files, tmp_path / name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    (tmp_path / "split-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"one of 3 files, and split-00002-of-00003\.gguf is missing"):
        gguf_files.of_path(first)


def install(site: Path, package: str, files: dict[str, bytes], requires: str = "") -> None:
    """A package with data files, as pip leaves it in a folder."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needed = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{needed}")
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


def test_packages_carry_models_under_other_names_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install(tmp_path, "leap-test-one", {"other_name/data/tiny.gguf": b"x"})
    assert [path.name for path in gguf_files.of_package("leap-test-one")] == ["tiny.gguf"]
    install(tmp_path, "leap-test-parts", {"p/__init__.py": b""}, "leap-test-part1==1.0")
    install(tmp_path, "leap-test-part1", {"p1/m.gguf.part00": b"a", "p1/m.gguf.part01": b"b"})
    assert [path.name for path in gguf_files.of_package("leap-test-parts")] == ["m.gguf.part00", "m.gguf.part01"]
    install(tmp_path, "leap-test-two", {"t/a.gguf": b"", "t/b.gguf": b""})
    with pytest.raises(UserError, match=r"several models; give the path of one of .*a\.gguf, .*b\.gguf"):
        gguf_files.of_package("leap-test-two")
    with pytest.raises(UserError, match="no installed package leap-test-none"):
        gguf_files.of_package("leap-test-none")
