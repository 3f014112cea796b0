"""What a name on the hub stands for: a commit, asked for once, and known without a network from what was downloaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from pipeline.config import CorpusConfig, ModelConfig
from pipeline.data import corpora, hub
from pipeline.model import loading

NEWEST, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.commit.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def online(monkeypatch: pytest.MonkeyPatch, sha: str | None) -> None:
    monkeypatch.setattr(hub, "answers", lambda: True)
    asked = SimpleNamespace(repo_info=lambda *_, **__: SimpleNamespace(sha=sha) if sha else 1 / 0)
    monkeypatch.setattr(hub, "HfApi", lambda: asked)


def downloaded(cache: Path, kind: str) -> None:
    references = cache / f"{kind}s--a--b" / "refs"
    references.mkdir(parents=True)
    (references / "main").write_text(OLDER)


def test_a_model_and_a_data_set_are_known_by_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, NEWEST)
    assert loading.identity(ModelConfig(source="a/b")) == f"a/b@{NEWEST}"
    assert corpora.content_key(CorpusConfig(source="hub:a/b")) == ["hub:a/b", NEWEST]
    hub.commit.cache_clear()
    online(monkeypatch, OLDER)
    assert loading.identity(ModelConfig(source="a/b")) == f"a/b@{OLDER}"


def test_without_a_network_it_is_what_was_downloaded_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "answers", lambda: False)
    downloaded(tmp_path, "dataset")
    assert hub.commit("dataset", "a/b", None) == OLDER
    assert hub.commit("model", "a/b", None) == "main"
    assert hub.commit("model", "a/b", "v1") == "v1"
    assert hub.commit("model", "a/b", NEWEST) == NEWEST


def test_a_repository_that_the_hub_does_not_show_is_left_to_who_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, None)
    assert hub.commit("model", "a/b", None) == "main"
