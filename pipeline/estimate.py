"""What a run will take, from sizes and settings alone: memory of a worker, and seconds by counting operations.

Shapes of the counts: N weights of linear layers, T tokens. A forward pass is 2·N·T floating-point operations, the
gradient of the activations as much again, and that of the masked weights 2·T for each.
"""

from __future__ import annotations

import time

import torch

from leap.layerwise import METHODS
from leap.optimisers import logit_optimiser
from pipeline.config import LearnConfig, RunConfig
from pipeline.plan import Measurement
from pipeline.sizes import Sizes

#: Operations a second of one GPU: what the published runs come to, 6·N·T over their GPU-hours, 0.8 to 1.5e14 on H100s.
GPU_SPEED = 1.2e14
#: Share of the speed of a plain matrix product that training reached: SmolLM2-135M, 512 tokens a step with
#: distillation, in 7 to 9 s on a core that multiplies at 130 GFLOP/s.
EFFICIENCY = 0.5
#: Bytes a second that a plain read takes from memory: seen with one thread on a server CPU; an H100's data sheet.
CPU_MEMORY, GPU_MEMORY = 1.2e10, 3e12
#: Seconds of a token outside the linear layers: seen on models of six and thirty blocks.
TOKEN_OVERHEAD = 5e-3
#: Seconds that starting a group of workers takes.
WORKER_START = 12.0
#: What a solver takes in each layer, in products of in²·out multiplications at EFFICIENCY: layers of 576 × 576 and
#: 576 × 1536 at 60 %, CPU time beside other work (docs/log.md, 2026-11-25). Those that iterate stop when they settle.
_SOLVER_STEPS = {"sparsegpt": 10, "thanos": 43, "admm": 28, "alps": 100, "optima": 40}
#: A question of a zero-shot task: choices times tokens of each with its context.
_TASK_TOKENS = 4 * 100


def cpu_speed(threads: int, dtype: str) -> float:
    """Operations a second of a large matrix product in ``dtype`` on this machine, measured for about 0.2 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 768, 768, dtype=getattr(torch, dtype))
        a @ b  # the first call sets the library up
        best, began = 0.0, time.perf_counter()
        while (at := time.perf_counter()) - began < 0.2:
            a @ b
            best = max(best, 2 * 768**3 / (time.perf_counter() - at))
    finally:
        torch.set_num_threads(before)
    return best


def worker_memory(config: RunConfig, learn: LearnConfig, sizes: Sizes) -> dict[str, float]:
    """Bytes of one worker by what they are for. What an allocator keeps beyond that is not counted."""
    settings, optimiser = learn.settings, logit_optimiser(learn.settings)
    width, logit = getattr(torch, config.model.dtype).itemsize, optimiser.dtype.itemsize
    state = sum(dtype.itemsize for dtype, _ in optimiser.parts.values())
    frozen = sizes.parameters + (sizes.prunable if settings.weights == "prior" else 0)
    accumulated = logit if settings.microbatches > learn.workers or settings.clip else 0
    tokens = settings.microbatch_rows * config.data.context_length
    # Within a block: inputs and outputs of the linear layers, and in fp32 what two norms keep, three times the width.
    blocks = tokens * (width * sizes.wires + 24 * sizes.states)
    if learn.activation_checkpointing:
        # What enters each block, and the inside of one at a time.
        blocks = tokens * width * sizes.states + blocks / sizes.blocks
    # Logits and their gradient, and a teacher's logits.
    copies = 3 if settings.distillation else 2
    return {
        f"weights, {config.model.dtype}, frozen": frozen * width / learn.workers,
        f"mask logits and {settings.optimiser}": sizes.prunable * (logit + state) / learn.workers,
        "gradient held to the end of a step": sizes.prunable * accumulated / learn.workers,
        # Of a masked layer the weight, the weight under the mask, the logits and their gradient.
        "largest layer, gathered": float(max(sizes.largest * width, sizes.largest_masked * 2 * (width + logit))),
        "activations of a micro-batch": float(blocks),
        "output of a micro-batch": float(width * copies * tokens * sizes.vocabulary),
    }


def training_tokens(config: RunConfig, learn: LearnConfig) -> int:
    """Tokens of one learning run."""
    return learn.settings.steps * learn.settings.batch_rows * config.data.context_length


def learn_seconds(config: RunConfig, learn: LearnConfig, sizes: Sizes, cpu: float) -> float:
    """One learning run, with the measurements on held-out text."""
    settings = learn.settings
    a_token = 4 * sizes.linear + 2 * sizes.prunable
    a_token += (
        2
        * sizes.linear
        * (bool(settings.distillation or settings.hidden_distillation) + learn.activation_checkpointing)
    )
    watched = 3 * (settings.steps // learn.watch_every + 1) * learn.watch_rows * config.data.context_length
    operations = a_token * training_tokens(config, learn) + 2 * sizes.linear * watched
    return WORKER_START + operations / (learn.workers * (GPU_SPEED if learn.gpu else cpu))


def prior_seconds(config: RunConfig, method: str, sizes: Sizes, cpu: float) -> float:
    """One layer-wise method at one sparsity, on one CPU."""
    needs = METHODS[method].needs
    if needs == "none":
        return sizes.prunable / cpu
    return _sweep_operations(config, sizes, _SOLVER_STEPS[method] if needs == "gram" else 0) / cpu


def reconstruct_seconds(config: RunConfig, sizes: Sizes, cpu: float) -> float:
    """New weights for one learned mask, on one CPU: the problem of ``optima``."""
    return _sweep_operations(config, sizes, _SOLVER_STEPS["optima"]) / cpu


def _sweep_operations(config: RunConfig, sizes: Sizes, solver_steps: int) -> float:
    tokens = config.prior.rows * config.data.context_length
    operations = 4.0 * sizes.prunable * tokens  # each block once for its statistics and once for what the next one sees
    if solver_steps:
        operations += 2 * sizes.gram * tokens + 2 * sizes.solve * solver_steps
    return operations


def evaluate_seconds(config: RunConfig, work: Measurement, sizes: Sizes, cpu: float) -> float | None:
    """One cell of the table; none for the full set of a task, whose size is not known here."""
    speed = GPU_SPEED if any(learn.gpu for learn in config.learn.values()) else cpu
    tokens: int | None
    if work.kind == "perplexity":
        tokens = config.data.evaluation[work.subject].tokens
    elif work.subject == "cloze" and config.evaluate.cloze:
        cloze = config.evaluate.cloze
        tokens = cloze.questions * 4 * (cloze.context_tokens + cloze.continuation_tokens)
    elif work.kind == "samples" and config.evaluate.samples:
        samples = config.evaluate.samples
        tokens = samples.prompts * (samples.prompt_tokens + samples.new_tokens)
    elif work.kind == "map":
        tokens = 0
    else:
        documents = config.evaluate.documents_for(work.subject)
        tokens = documents * _parts(work.spec) * _TASK_TOKENS if documents else None
    return None if tokens is None else 2 * sizes.linear * tokens / speed


def benchmark_seconds(config: RunConfig, sizes: Sizes) -> float:
    """The speed of one variant: products with each shape, then rounds of decoding and one more for each of two parts.

    A token reads every linear layer's weights; the packed ones are counted like dense ones.
    """
    settings = config.benchmark
    if settings is None:
        return 0.0
    on_gpu = any(learn.gpu for learn in config.learn.values())
    seconds = 0.0
    for dtype in settings.dtypes:
        token = TOKEN_OVERHEAD + sizes.linear * getattr(torch, dtype).itemsize / (GPU_MEMORY if on_gpu else CPU_MEMORY)
        seconds += sizes.shapes * settings.seconds + 2 * (settings.rounds + 2) * settings.tokens * token
    return seconds


def _parts(spec: str) -> int:
    """Single tasks that a task stands for; those of the hub count as one, reading their list takes too long."""
    if "/" not in spec:
        return 1
    from pipeline.evaluation.tasks import resolve_task

    try:
        return len(resolve_task(spec).entries)
    except ValueError:  # the checks before a run say what is wrong with it
        return 1
