"""A tiny random model with its own tokenizer and corpus, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "the",
    "a",
    "mask",
    "weight",
    "layer",
    "block",
    "token",
    "model",
    "learns",
    "keeps",
    "drops",
    "prunes",
    "small",
    "large",
    "sparse",
    "dense",
    "gate",
    "noise",
    "step",
    "loss",
    "density",
    "scale",
    "temperature",
    "row",
    "column",
    "shard",
    "worker",
    "stage",
    "text",
    "corpus",
    "reads",
    "writes",
    "counts",
    "until",
    "after",
    "before",
]


def sentences(seed: int, count: int) -> str:
    """Text without meaning but with a vocabulary."""
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=9)) + f" {rng.randint(0, 999)}." for _ in range(count))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model/`` (two Llama blocks), ``text.jsonl`` and ``tiny.yaml``, a recipe of seconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny")
    documents = [sentences(seed, 12) for seed in range(400)]
    with (directory / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents[:50],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    source = str(directory / "text.jsonl")
    recipe = {
        "base": "base",
        "name": "tiny",
        "sparsities": [0.5],
        "model": {"source": str(directory / "model")},
        "data": {
            "context_length": 32,
            "shards": 2,
            "calibration": {"source": source, "share": [0, 60], "tokens": 4096},
            "heldout": {"source": source, "share": [60, 80], "tokens": 512},
            "evaluation": {"words": {"source": source, "share": [80, 100], "tokens": 1024}},
        },
        "prior": {"rows": 16},
        "benchmark": None,
        "learn": {
            "leap": {
                "published": True,
                "settings": {
                    "steps": 120,
                    "batch_rows": 4,
                    "microbatch_rows": 1,
                    "distillation": 0.5,
                    "density": {"kind": "lagrangian", "weight": 50},
                    "learning_rate": 0.01,
                    "matrix_rate": 0.02,
                },
                "workers": 2,
                "checkpoint_every": 10,
                "watch_every": 60,
                "watch_rows": 4,
            }
        },
        "evaluate": {"cloze": {"questions": 12, "context_tokens": 16, "continuation_tokens": 4}},
    }
    (directory / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return directory


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the installed dependencies, but not this project's editable install; one a test file.

    A path file names the site-packages folder; path files inside that folder, through which the editable install
    works, are then not read.
    """
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    probe = subprocess.run([python, "-c", "import ray, torch, pipeline"], capture_output=True, text=True, cwd=home)
    assert "No module named 'pipeline'" in probe.stderr, probe.stderr
    return python


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def run_command(tiny: Path) -> Command:
    """Starts ``pipeline/run.py run`` on the tiny recipe in a process of its own."""

    def start(output: Path, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "pipeline" / "run.py"),
                "run",
                "--recipe",
                str(tiny / "tiny.yaml"),
                f"output={output}",
                *overrides,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "160"},
            start_new_session=True,
        )

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a command and return what it printed."""
    try:
        output, _ = process.communicate(timeout=800)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output[-4000:]
    return output


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process becomes larger; the system refuses it as it refuses a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
