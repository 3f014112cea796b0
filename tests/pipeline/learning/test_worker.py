"""How a worker of a learning run starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file, save_file

#: A worker without others.
ALONE = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "DS_ACCELERATOR": "cpu",
}
SCRIPT = """
import torch.distributed as dist
from pipeline.learning.worker import join_processes
join_processes("gloo")
assert dist.get_world_size() == 1
"""


PARTITIONED = """
import sys
from pipeline.config import LearnConfig, ModelConfig
from pipeline.learning.worker import join_processes
from pipeline.learning.zero import ZeroModel
join_processes("gloo")
learn = LearnConfig()
ZeroModel(ModelConfig(source=sys.argv[1]), learn, learn.settings.family.gate(), None)
"""


def test_a_worker_reads_no_checkpoint_that_lacks_a_tensor(tiny: Path, tmp_path: Path):
    """DeepSpeed partitions random numbers as readily."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", PARTITIONED, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "pipeline.errors.UserError: model.source: " in last
    assert last.endswith("it lacks model.layers.1.self_attn.q_proj.weight")


def test_a_build_that_was_interrupted_holds_nobody_up(tmp_path: Path):
    """DeepSpeed's operations are built under a lock file; one left behind is waited for without end."""
    for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    env = os.environ | ALONE | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, check=True, timeout=120)
