"""``leap.prune`` by name on texts, and what its result leaves behind: a directory with its card, here or on the hub."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from gguf_model import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import leap
from leap import api
from leap.heldout import heldout_loss
from leap.model_card import model_card
from leap.texts import token_rows

EMBEDDED = Path(__file__).resolve().parents[2] / "pipeline" / "nano" / "model"
TEXTS = [f"The function number {number} returns a list of names and {number % 7} values." for number in range(200)]


@pytest.fixture(scope="module")
def result() -> leap.PruneResult:
    """The embedded model, pruned by its name on strings for two steps."""
    bars: list[dict[str, str]] = []
    bar = transformers.utils.logging.tqdm

    class Bar:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._bar = bar(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._bar, name)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None:
            self._bar.close()

        def __iter__(self) -> Any:
            return iter(self._bar)

        def set_postfix(self, values: dict[str, str]) -> None:
            bars.append(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.transformers_logging, "tqdm", Bar)
        pruned = leap.prune(EMBEDDED, TEXTS, sparsity=0.5, steps=2, heldout=TEXTS[:20], row_length=64)
    object.__setattr__(pruned, "bars", bars)
    return pruned


def test_a_model_by_name_learns_from_strings(result: leap.PruneResult) -> None:
    zero, total = leap.zeros(result.model)
    assert zero == round(0.5 * total)
    assert result.settings.steps == 2
    assert result.text == "1,024 tokens from 16 rows of 64"
    dense = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    rows = token_rows(TEXTS[:20], result.tokenizer, 64, 10**6)
    expected = {"dense": math.exp(heldout_loss(dense, rows)), "pruned": math.exp(heldout_loss(result.model, rows))}
    assert result.perplexity == pytest.approx(expected)


def test_the_bar_shows_a_loss_that_is_one(result: leap.PruneResult) -> None:
    shown = result.bars[-1]
    last = result.history[-1]
    assert float(shown["loss"]) == pytest.approx(last["lm_loss"], abs=1e-3)
    assert float(shown["to dense"]) == pytest.approx(last["divergence"], abs=1e-3)
    assert float(shown["density terms"]) == pytest.approx(last["loss"] - last["divergence"], abs=2e-3)


def test_what_is_saved_loads_and_says_how(result: leap.PruneResult, tmp_path: Path) -> None:
    result.save(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["leap", "pruned", "sparse", "unstructured-sparsity"],
    }
    for said in ("50 % of the", "admm's scores", "1,024 tokens from 16 rows", f"{result.perplexity['pruned']:.2f}"):
        assert said in body
    shares = dict(re.findall(r"\| `(\w+)` \| ([\d.]+) % \|", body))
    assert shares.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    down = [linear.weight for name, linear in result.model.named_modules() if name.endswith("down_proj")]
    zero = sum(int((w == 0).sum()) for w in down) / sum(w.numel() for w in down)
    assert float(shares["down_proj"]) == pytest.approx(100 * zero, abs=0.06)
    # The code in the card works as it stands.
    code = "\n".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL)).replace(
        '"packed/"', repr(str(tmp_path / "p"))
    )
    names: dict[str, Any] = {}
    exec(code, names)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, result.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "mine")("abc")["input_ids"] == result.tokenizer("abc")["input_ids"]


def test_pushed_it_is_on_the_hub(result: leap.PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, name: str, **options: Any) -> Any:
            calls.append(("create", (name, options)))
            return _Url("https://hub.example/me/mine", "me/mine")

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            folder = Path(folder_path)
            AutoModelForCausalLM.from_pretrained(folder)
            calls.append(("upload", (repo_id, commit_message, (folder / "README.md").read_text())))

    monkeypatch.setattr(api, "HfApi", Hub)
    assert result.push_to_hub("mine", private=True, token="secret") == "https://hub.example/me/mine"
    assert calls[:2] == [("token", "secret"), ("create", ("mine", {"private": True, "exist_ok": True}))]
    name, message, card = calls[2][1]
    assert (name, message) == ("me/mine", "Pruned with LEAP")
    assert 'from_pretrained("me/mine")' in card
    assert card.count("# mine\n") == 1


class _Url(str):
    def __new__(cls, address: str, repo_id: str) -> _Url:
        url = super().__new__(cls, address)
        url.repo_id = repo_id
        return url


def test_a_base_model_on_the_hub_is_named(result: leap.PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result.model.config, "name_or_path", "someone/something")
    assert "base_model: someone/something\n" in model_card(result, "mine")


def test_steps_and_settings_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give steps or tokens, or settings"):
        leap.prune(EMBEDDED, TEXTS, sparsity=0.5, steps=2, settings=leap.LearnSettings())


def test_what_cannot_be_exported_is_refused_before_learning() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    model.hf_quantizer = SimpleNamespace()
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match=r"quantised \(awq\); give the model that it was made from"):
        leap.prune(model, TEXTS, sparsity=0.5, steps=2)


def test_a_model_read_from_gguf_is_pruned_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    rows = torch.randint(64, (16, 16), generator=torch.Generator().manual_seed(0))
    result = leap.prune(model, rows, sparsity=0.5, steps=1)
    result.save(tmp_path / "pruned")
    zero, total = leap.zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"))
    assert zero == round(0.5 * total)
