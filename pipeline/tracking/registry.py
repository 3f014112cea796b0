"""Exported models as versions in MLflow's model registry, loadable by ``mlflow.transformers`` and ``mlflow.pyfunc``.

The files are those of the export: safetensors and JSON, nothing pickled. The description beside them is written here,
because ``mlflow.transformers.save_model`` (3.17) fails on a directory under transformers 5 and would load a model
that is given as an object into memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SCORE, MEASURED_ON = "score", "measured_on"
"""Tags of a version: what is compared, lower is better, and the fingerprint of what it was measured on."""


def register(client: MlflowClient, run_id: str, export: Path, name: str, alias: str, tags: Mapping[str, str]) -> None:
    """Upload a Hugging Face directory to the run and make it a version of ``name``; see ``Run.log_model``."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    folder = f"models/{export.name}"
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((v for v in known if v.source and v.source.endswith(f"/{folder}")), None)
    if version is None:
        root = client.get_run(run_id).info.artifact_uri
        _upload(client, run_id, export, folder)
        version = client.create_model_version(name, f"{root}/{folder}", run_id=run_id, tags=dict(tags))
    holder = _holder(client, name, alias)
    if holder is None or _better(version, holder):
        client.set_registered_model_alias(name, alias, version.version)


def _upload(client: MlflowClient, run_id: str, export: Path, folder: str) -> None:
    from mlflow import pyfunc
    from mlflow.models import Model

    architecture = json.loads((export / "config.json").read_text())
    tokenizer = json.loads((export / "tokenizer_config.json").read_text())
    described = Model(run_id=run_id, artifact_path=folder)
    described.add_flavor(
        "transformers",
        transformers_version=installed("transformers"),
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=architecture["architectures"][0],
        torch_dtype=f"torch.{architecture.get('dtype', 'float32')}",
        source_model_name=architecture["model_type"],
        model_binary="model",
        components=["tokenizer"],
        tokenizer_type=tokenizer.get("tokenizer_class", "AutoTokenizer"),
    )
    pyfunc.add_to_model(described, loader_module="mlflow.transformers")
    client.log_artifacts(run_id, str(export), f"{folder}/model")
    for file in export.iterdir():
        if not file.name.endswith((".safetensors", ".leap", ".index.json")):
            client.log_artifact(run_id, str(file), f"{folder}/components/tokenizer")
    needed = "".join(f"{package}=={installed(package)}\n" for package in ("torch", "transformers"))
    client.log_text(run_id, needed, f"{folder}/requirements.txt")
    # Last: what has a description is whole.
    client.log_text(run_id, described.to_yaml(), f"{folder}/MLmodel")


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _better(version: ModelVersion, holder: ModelVersion) -> bool:
    if version.tags[MEASURED_ON] != holder.tags.get(MEASURED_ON):
        return True
    return float(version.tags[SCORE]) < float(holder.tags[SCORE])
