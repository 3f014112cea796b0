"""The OpenAI-compatible server with packed weights, asked by OpenAI's own client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import free_port
from test_quantiser import ROOT, packed_nano
from transformers import AutoModelForCausalLM, AutoTokenizer

ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_nano(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(packed: Path) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason='needs pip install "transformers[serving]"')
    port = free_port()
    command = [sys.executable, "-m", "leap.serve", str(packed), "--port", str(port), "--device", "cpu"]
    with (packed / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
    try:
        asked = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        while not healthy(port):
            assert server.poll() is None, (packed / "log").read_text()
            time.sleep(0.5)
        yield asked
    finally:
        server.terminate()
        server.wait(timeout=30)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_completions_are_those_of_the_packed_model(client: Any, packed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompt = "The function returns"
    ids = tokenizer(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(packed)
    expected = tokenizer.decode(
        model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    )
    answer = client.completions.create(model=str(packed), prompt=prompt, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected
    parts = client.completions.create(model=str(packed), prompt=prompt, max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected


def test_what_is_missing_is_named() -> None:
    code = "import leap.serve as s; s.is_serve_available = lambda: False; s.main([])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1] == 'leap.serve needs more packages: pip install "transformers[serving]"'
