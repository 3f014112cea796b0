"""Zero-shot accuracy on an lm-eval task, document by document."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from leap.checkpoint import Checkpoint
from pipeline.evaluation.language_model import BoundedHFLM
from pipeline.evaluation.scores import Document, ZeroShot, zero_shot_of
from pipeline.evaluation.tasks import resolve_task


def zero_shot(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | str | Path,
    task: str | Path,
    *,
    limit: int | None,
    batch_size: int | Literal["auto"],
    device: str | torch.device,
    max_length: int,
    seed: int,
    skip_first: int = 0,
    trust_remote_code: bool = False,
) -> ZeroShot:
    """Evaluate ``model`` on ``task`` without examples in the prompt.

    The metrics of a group (MMLU, say) are means over all its evaluated documents, whatever weights its file asks for;
    the standard error is that of a stratified mean.

    Args:
        model: a loaded model, which is moved to ``device`` and left in eval mode, or a Hugging Face directory, which is
            loaded in its stored dtype.
        tokenizer: a loaded tokenizer, or a directory.
        task: see ``tasks.resolve_task``.
        limit: documents per single task (in a group, per subject), at least 1, drawn at random by ``seed`` and the
            task's name; all when it is None or larger than what there is. A smaller limit gives a subset of a larger
            one's.
        batch_size: requests per forward pass; halved as long as it does not fit into memory.
        max_length: context length in tokens; longer requests lose tokens on the left and are counted.
        skip_first: documents at the beginning of the task that are left out, because settings were chosen on them. In
            a group they are spread evenly over the subjects and rounded up.
        trust_remote_code: for loading from directories.

    Raises:
        ValueError: unknown task, a task without ``acc`` or that generates text, no document left after
            ``skip_first``, ``max_length`` beyond the model's positions, or NaN log-probabilities.
    """
    resolved = resolve_task(task)
    if isinstance(model, str | Path):
        model = Checkpoint(model, trust_remote_code=trust_remote_code).load(dtype="auto")
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} exceeds the model's {positions} positions")

    with _quiet():
        tasks = resolved.load()
        metrics = _mean_metrics(resolved.name, tasks)
        sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
        chosen = choose_documents(sizes, limit=limit, seed=seed, skip_first=skip_first)
        for single in tasks.values():
            single.set_config(key="num_fewshot", value=0)
            single.set_fewshot_seed(seed)
        language_model = BoundedHFLM(
            model.to(device),  # type: ignore[arg-type]  # transformers' wrapper hides the signature
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )
        # Not simple_evaluate: it spends seconds per call on collecting versions with subprocesses.
        output = evaluate(
            lm=language_model,
            task_dict={"tasks": tasks, "groups": {}},
            samples={name: indices for name, indices in chosen.items() if len(indices) < sizes[name]},
            bootstrap_iters=0,
        )
    return _summarise(resolved.name, tasks, output["samples"], metrics, language_model.truncated)


def choose_documents(
    sizes: Mapping[str, int], *, limit: int | None, seed: int, skip_first: int
) -> dict[str, list[int]]:
    """Ascending indices of the documents to evaluate, by task.

    Args:
        sizes: documents of each single task.

    Raises:
        ValueError: ``skip_first`` leaves a task without documents.
    """
    skipped = math.ceil(skip_first / len(sizes))
    chosen = {}
    for name, size in sizes.items():
        if skipped >= size:
            raise ValueError(f"{name} has {size} documents, none is left after skipping the first {skipped}")
        # A random order per task and its first part: it depends neither on the other tasks nor on the limit.
        order = list(range(skipped, size))
        random.Random(f"{seed}/{name}").shuffle(order)
        chosen[name] = sorted(order[:limit])
    return chosen


def _mean_metrics(name: str, tasks: Mapping[str, Task]) -> list[str]:
    """The metrics that every task has and that are means over documents."""
    shared: list[str] | None = None
    for single, task in tasks.items():
        metrics = [metric for metric, aggregation in task.aggregation().items() if aggregation is mean]
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood") or "acc" not in metrics:
            raise ValueError(
                f"task {name}: {single} is a {task.OUTPUT_TYPE} task with the metrics "
                f"{', '.join(task.aggregation())}; only tasks that score given choices by acc are supported"
            )
        shared = [metric for metric in metrics if shared is None or metric in shared]
    assert shared is not None
    return shared


def _chance(tasks: Mapping[str, Task], samples: Mapping[str, list[dict[str, Any]]]) -> float:
    """Expected accuracy of guessing on the evaluated documents."""
    levels = [
        # A task without choices asks for one continuation among all that there are.
        1 / len(tasks[name].doc_to_choice(sample["doc"])) if tasks[name].OUTPUT_TYPE == "multiple_choice" else 0.0
        for name, documents in samples.items()
        for sample in documents
    ]
    return fmean(levels)


def _summarise(
    name: str,
    tasks: Mapping[str, Task],
    samples: Mapping[str, list[dict[str, Any]]],
    metrics: list[str],
    truncated: set[tuple[str, str]],
) -> ZeroShot:
    per_document = [
        Document(task=single, doc=sample["doc_id"], scores={metric: float(sample[metric]) for metric in metrics})
        for single, documents in samples.items()
        for sample in documents
    ]
    cut = sum(
        any(tuple(arguments[:2]) in truncated for arguments in sample["arguments"])
        for documents in samples.values()
        for sample in documents
    )
    return zero_shot_of(name, per_document, truncated=cut, chance=_chance(tasks, samples))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's log, its progress bars (they have no switch) and transformers' warnings of long texts."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
