"""What every Ray process of a run does first."""

from __future__ import annotations

import os

import ray

#: For ``runtime_env``: runs in each worker process before anything else.
SETUP_HOOK = {"worker_process_setup_hook": "pipeline.ray_process.name_cluster"}


def name_cluster() -> None:
    """Tell libraries in this process which cluster it belongs to.

    Ray's state API, without being told, takes the cluster that was started last with ``ray start``, or looks among the
    processes of the machine and gives up where it finds two. Ray Train asks it whether a controller is alive; beside
    another Ray on the machine, the place of a trial that was stopped would never be free again (Ray 2.60).
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
