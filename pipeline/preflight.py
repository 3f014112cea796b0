"""What can be known to go wrong before anything is started. Each problem is a :class:`UserError` of one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from leap.layerwise import METHODS
from pipeline import models
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.plan import Plan, task_directory, task_specs
from pipeline.sizes import Sizes, measure


def check(plan: Plan) -> tuple[Sizes, list[str]]:
    """Check a plan against the model, the corpora's files and the disk. Returns sizes and warnings.

    Raises:
        UserError: the first thing that cannot work.
    """
    config = plan.config
    architecture = models.load_config(config.model)
    text = architecture.get_text_config()
    length = config.data.context_length
    if length > text.max_position_embeddings:
        raise UserError(
            f"data.context_length: {length} tokens are longer than the model's context of {text.max_position_embeddings}"
        )
    tokenizer = models.load_tokenizer(config.model)
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"model.source: the tokenizer has {len(tokenizer)} tokens and the model {text.vocab_size}; they do not fit"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("model.source: the tokenizer has no end-of-text token, which separates documents in a row")
    if config.evaluate.cloze and not config.data.evaluation:
        raise UserError("evaluate.cloze: needs a text in data.evaluation")
    warnings = _corpora(plan) + _tasks(config)
    sizes = measure(config)
    _disk(plan, sizes)
    return sizes, warnings


def _corpora(plan: Plan) -> list[str]:
    from pipeline import corpora

    warnings = []
    for role, (_, corpus, _) in plan.corpora.items():
        try:
            files = corpora.expand(corpus)
        except UserError as error:
            raise UserError(f"data.{_key(plan.config, role)}.{error}") from None
        if files is None and corpus.fallback and corpora.describe(corpus) == "embedded":
            warnings.append(f"data.{_key(plan.config, role)}: no file of {corpus.source} exists; using the embedded text")
    return warnings


def _key(config: RunConfig, role: str) -> str:
    return f"evaluation.{role}" if role in config.data.evaluation else role


def _tasks(config: RunConfig) -> list[str]:
    settings = config.evaluate
    if not settings.tasks:
        return []
    if settings.task_directory and task_directory(config) is None:
        return [f"evaluate.task_directory: {settings.task_directory} does not exist; its tasks are left out"]
    if settings.task_directory:
        from pipeline.evaluation.tasks import resolve_task

        for name, spec in task_specs(config).items():
            try:
                resolve_task(spec)
            except ValueError as error:
                raise UserError(f"evaluate.tasks: {name}: {error}") from error
    return []


def _disk(plan: Plan, sizes: Sizes) -> None:
    if "://" in plan.config.output:
        return
    needed = 0
    for (method, _), stage in plan.priors.items():
        if stage.manifest() is None:
            needed += sizes.scores + (sizes.export if METHODS[method].changes_weights else 0)
    needed += sum(3 * sizes.logits for work in plan.learns if work.stage.manifest() is None)
    needed += sum(sizes.export for v in plan.variants if v.export and v.export.manifest() is None)
    where = Path(plan.config.output).expanduser().resolve()
    while not where.exists():
        where = where.parent
    if not os.access(where, os.W_OK):
        raise UserError(f"output: {where} is not writable")
    free = shutil.disk_usage(where).free
    if needed > free:
        raise UserError(
            f"output: the artifacts need about {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB free"
        )


def check_cluster(config: RunConfig, resources: dict[str, float]) -> None:
    """Check that the workers of every learning run can be placed.

    Args:
        resources: what ``ray.cluster_resources()`` says.

    Raises:
        UserError: more workers than the cluster can place.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    for name, learn in config.learn.items():
        if learn.gpu and learn.workers > gpus:
            raise UserError(f"learn.{name}.workers: {learn.workers} workers with a GPU each, the cluster has {gpus} GPUs")
        if not learn.gpu and learn.workers * learn.threads > cpus:
            raise UserError(
                f"learn.{name}.workers: {learn.workers} workers of {learn.threads} threads need "
                f"{learn.workers * learn.threads} CPUs, the cluster has {cpus}"
            )


def environment() -> dict[str, Any]:
    """Versions and hardware, for the records."""
    import platform
    from importlib.metadata import version

    packages = ["torch", "ray", "deepspeed", "transformers", "datasets", "triton", "lm-eval", "mlflow"]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{package: version(package) for package in packages},
    }
