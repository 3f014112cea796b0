"""Exported models as versions of a registered model, loaded back through MLflow."""

from __future__ import annotations

from pathlib import Path

import mlflow.artifacts
import mlflow.transformers
import pytest
import torch
from mlflow import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.results.recording import alias
from pipeline.tracking import make_tracker


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_the_best_version_has_the_alias_and_can_be_loaded(runs: Path, tiny: Path) -> None:
    export = str(tiny / "model")
    uri = f"sqlite:///{runs / 'mlflow.db'}"

    def register(run: str, score: str, measured_on: str = "words") -> str:
        with make_tracker(TrackingConfig(experiment="test"), runs / "r").start_run(run) as opened:
            for _ in range(2):  # a record that is delivered twice makes one version
                opened.log_model(export, "tiny", "best-50", {"score": score, "measured_on": measured_on})
        return client.get_model_version_by_alias("tiny", "best-50").version

    client = MlflowClient(uri)
    assert [register("a", "30.5"), register("b", "31.0"), register("c", "9.5")] == [1, 1, 3]
    assert register("d", "50.0", "other words") == 4, "not comparable: the newer one"
    assert len(client.search_model_versions("name = 'tiny'")) == 4

    held = client.get_model_version_by_alias("tiny", "best-50")
    files = {path.name for path in Path(held.source.removeprefix("file://")).rglob("*") if path.is_file()}
    assert {"MLmodel", "model.safetensors", "tokenizer.json"} <= files
    assert not {name for name in files if name.endswith((".pkl", ".bin", ".pt", ".pickle"))}

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.transformers.load_model("models:/tiny@best-50", return_type="components")
        fetched = mlflow.artifacts.download_artifacts("models:/tiny@best-50")
        served = mlflow.pyfunc.load_model("models:/tiny@best-50").predict(["the mask"])
    finally:
        mlflow.set_tracking_uri(before)
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(export)
    tokens = loaded["tokenizer"]("the mask learns", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded["model"](tokens).logits, expected(tokens).logits)
    assert isinstance(served[0], str)
    plain = AutoModelForCausalLM.from_pretrained(Path(fetched) / "model")
    assert torch.equal(plain(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(("sparsity", "name"), [(0.5, "best-50"), (0.625, "best-62_5"), (0.0, "best-0")])
def test_aliases_are_names_that_mlflow_takes(sparsity: float, name: str) -> None:
    assert alias(sparsity) == name
