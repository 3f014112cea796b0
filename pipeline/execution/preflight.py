"""What can be known to go wrong before anything is started. Each problem is a :class:`UserError` of one line."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import fsspec
import torch
from transformers import PreTrainedTokenizerBase

from leap.layerwise import METHODS, InputStatistics, Target
from leap.surgery import NotRunError, check_runs
from pipeline.config import PriorConfig, RunConfig
from pipeline.data import corpora, local_files
from pipeline.errors import UserError
from pipeline.execution.estimate import machine_of
from pipeline.execution.plan import task_directory, task_specs
from pipeline.model import loading
from pipeline.model.sizes import Sizes, measure
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.planned import Plan
from pipeline.tracking import check_stores

logger = logging.getLogger(__name__)

#: Text of local files up to this size is counted before a run, until there is enough: a few seconds at most.
COUNTED_BYTES = 16 * 2**20


def check(plan: Plan) -> tuple[Sizes, list[str]]:
    """Check a plan against the model, the corpora's files and the disk. Returns sizes and warnings.

    Raises:
        UserError: the first thing that cannot work.
    """
    config = plan.config
    architecture = loading.load_config(config.model)
    text = architecture.get_text_config()
    length, longest = config.data.context_length, getattr(text, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UserError(f"data.context_length: {length} tokens are longer than the model's context of {longest}")
    tokenizer = loading.load_tokenizer(config.model)
    tokens = _tokens_of_text(tokenizer)
    if tokens > text.vocab_size:
        raise UserError(
            f"model.source: the tokenizer has {tokens} tokens and the model {text.vocab_size}; they do not fit"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("model.source: the tokenizer has no end-of-text token, which separates documents in a row")
    for name in ("eos_token", "bos_token", "pad_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= text.vocab_size:
            raise UserError(
                f"model.source: the tokenizer's {name} {getattr(tokenizer, name)} is number {number}, beyond the "
                f"model's {text.vocab_size} embeddings; they do not fit"
            )
    if config.evaluate.cloze and not config.data.evaluation:
        raise UserError("evaluate.cloze: needs a text in data.evaluation")
    warnings = plan.notes + _tasks(config)
    sizes = measure(config)
    if not config.model.allow_dense and (reason := sizes.weights.refusal()):
        raise UserError(f"model.source: of {config.model.source} {reason}; model.allow_dense=true prunes what can be")
    loading.check_tensors(config.model)
    if config.learn:
        _masked_layers_run(config)
    _prior(config.prior, sizes)
    for name, learn in config.learn.items():
        try:
            sizes.layout(learn.settings.family)
        except ValueError as error:
            raise UserError(f"learn.{name}.settings.family: {error}") from error
    _disk(plan, sizes)
    return sizes, warnings + _texts(plan, tokenizer)


def _masked_layers_run(config: RunConfig) -> None:
    """Check that a mask can be learned in every layer, where that shows without weights.

    Many models ask in their forward pass for values, which tensors on the device meta do not have; what those leave
    out shows in the first step of learning.
    """
    try:
        check_runs(loading.meta_model(config.model), torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    except NotRunError as error:
        raise UserError(f"model.source: {config.model.source}: {error}") from error
    except Exception as error:  # of whatever kind a model's own code raises
        logger.debug("no forward pass without weights: %s", error)


def _tokens_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model needs to know. A special token beyond them, as Gemma's for images, is not in any text."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return 1 + max(number for number in tokenizer.get_vocab().values() if number not in special)


def _texts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check that local files hold texts, and small ones enough tokens. Returns warnings.

    What files on a store, or large ones, hold is found out by the run. Documents of finished work are not looked at: a
    text that shares some with it may turn out to have a few less.
    """
    length = plan.config.data.context_length
    hashes: dict[str, set[str]] = {}
    warnings = []
    for stage in plan.of(Calibrate):
        corpus, key = stage.corpus, stage.section
        files = corpora.expand(corpus)
        if not files or stage.finished or any("://" in file for file in files):
            continue
        try:
            if not [file for file in files if local_files.check(file, corpus.text_field, tokenizer)]:
                raise UserError(f"source: {corpora.describe(corpus)[:200]}: nothing but empty files")
            if sum(os.stat(file).st_size for file in files) > COUNTED_BYTES:
                continue
            wanted = -(-corpus.tokens // length) * length
            excluded = set().union(*(hashes.get(other.role, ()) for other in stage.apart))
            found = local_files.count(files, corpus, tokenizer, wanted, excluded)
            hashes[stage.role] = found.hashes
            short = corpora.shortage(corpus, found.documents, found.tokens, length, stage.least)
        except UserError as error:
            raise UserError(f"{key}.{error}") from error
        if short:
            warnings.append(f"{key}.{short}")
    return warnings


def _prior(prior: PriorConfig, sizes: Sizes) -> None:
    """Check that the pattern divides each layer, and the options of methods by pruning a small layer with them."""
    if prior.pattern and any(columns % prior.pattern[1] for columns in sizes.columns):
        found = ", ".join(map(str, sorted(sizes.columns)))
        raise UserError(f"prior.pattern: groups of {prior.pattern[1]} do not divide layers of {found} inputs")
    target = Target.n_m(*prior.pattern) if prior.pattern else Target(0.5)
    columns = prior.pattern[1] if prior.pattern else 8
    for name, options in prior.options.items():
        stats = InputStatistics(columns, needs="gram")
        stats.update(torch.eye(columns))
        try:
            METHODS[name](torch.ones(columns, columns), stats, target, **options)
        except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
            raise UserError(f"prior.options.{name}: {error}") from error


def _tasks(config: RunConfig) -> list[str]:
    settings = config.evaluate
    if not settings.tasks:
        return []
    if settings.task_directory and task_directory(config) is None:
        missing = f"evaluate.task_directory: {settings.task_directory} does not exist"
        if "$" not in settings.task_directory:
            raise UserError(f"{missing}; give a directory of task files, or null for tasks from the hub")
        return [f"{missing}; its tasks are left out"]
    # Not at the top: lm-eval takes seconds to import.
    from pipeline.evaluation.tasks import resolve_task

    for name, spec in task_specs(config).items():
        try:
            resolve_task(spec)
        except ValueError as error:
            raise UserError(f"evaluate.tasks: {name}: {' '.join(str(error).split())}") from error
    return []


def _disk(plan: Plan, sizes: Sizes) -> None:
    local = "://" not in plan.config.output
    check_stores(plan.config.tracking, Path(plan.config.output).expanduser() if local else Path("runs"))
    if not local:
        try:
            fsspec.core.url_to_fs(plan.config.output)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise UserError(f"output: {plan.config.output}: {' '.join(str(error).split())}") from error
        return
    machine = machine_of(plan.config)
    needed = sum(stage.cost(sizes, machine).disk or 0.0 for stage in plan.stages if not stage.finished)
    where = Path(plan.config.output).expanduser().resolve()
    while not where.exists():
        where = where.parent
    if not where.is_dir():
        raise UserError(f"output: {where} is a file; give a directory or a URI")
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
            raise UserError(
                f"learn.{name}.workers: {learn.workers} workers with a GPU each, the cluster has {gpus} GPUs"
            )
        if not learn.gpu and learn.workers * learn.threads > cpus:
            raise UserError(
                f"learn.{name}.workers: {learn.workers} workers of {learn.threads} threads need "
                f"{learn.workers * learn.threads} CPUs, the cluster has {cpus}"
            )
