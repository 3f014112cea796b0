"""How a worker of a learning run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SCRIPT = """
import torch.distributed as dist
from pipeline.learning.worker import join_processes
join_processes("gloo")
assert dist.get_world_size() == 1
"""


def test_a_build_that_was_interrupted_holds_nobody_up(tmp_path: Path):
    """DeepSpeed's operations are built under a lock file; one left behind is waited for without end."""
    for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env = os.environ | where | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, check=True, timeout=120)
