"""A learning run as a job of Ray Train, started from a Ray task: several can run side by side, and under Ray Tune."""

from __future__ import annotations

import os
import time

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.learning.worker import Job, train_loop


@ray.remote(num_cpus=0, max_retries=0)
def fit(job: Job, storage_path: str) -> None:
    """Train until the last checkpoint is written; continues from the last one that is there.

    Args:
        storage_path: where Ray Train keeps its own books; nothing of ours is there.

    Raises:
        DamagedError: what the workers would read is not what was written; looked at before they are started.
    """
    for stage in (job.calibration, job.heldout, job.prior):
        stage.path()
    trainer(job, storage_path).fit()


def trainer(job: Job, storage_path: str) -> TorchTrainer:
    """The trainer of one learning run."""
    learn = job.learn
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if learn.gpu else "cpu")
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if learn.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=learn.workers,
            use_gpu=learn.gpu,
            resources_per_worker={"GPU": 1} if learn.gpu else {"CPU": learn.threads},
        ),
        run_config=RunConfig(
            name=f"{job.stage.item}-{job.stage.key}-{time.time_ns()}",
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=learn.max_failures),
        ),
    )
