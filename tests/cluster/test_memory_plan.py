"""The memory plan against itself, and against what a training step was measured to take."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from leap.settings import LearnSettings
from pipeline.config import recipe
from pipeline.model.sizes import measure
from pipeline.stages.learn import worker_memory


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_plan", ROOT / "cluster" / "memory_plan.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_workers_need_less_each_and_the_plan_says_what_fits(
    planner: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planner.main(["--recipe", "nano", "--workers", "1", "2", "--gpu-memory", "0.0001", "seed=1"]) == 0
    out = capsys.readouterr().out
    for text in ("learn.leap of nano", "1 worker", "2 workers", "mask logits and adam", "together"):
        assert text in out
    together = next(line.split() for line in out.splitlines() if line.startswith("together"))
    assert float(together[1]) > float(together[2]) > 0
    assert out.splitlines()[-1].split()[-2:] == ["no", "no"]
    assert planner.main(["--recipe", "nano", "--deepspeed"]) == 0
    assert '"stage": 3' in capsys.readouterr().out
    assert planner.main(["--recipe", "nan"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(("optimiser", "length"), [("adam", 32), ("adam", 512), ("adam8bit", 32)])
def test_a_step_takes_what_the_plan_says(optimiser: str, length: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=6,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    command = [sys.executable, str(ROOT / "pipeline" / "benchmarks" / "masked_step.py"), "--model", str(tmp_path)]
    command += ["--peak", optimiser, "--tokens", str(length), "--length", str(length), "--threads", "1"]
    # Else glibc keeps freed blocks of a few MB, which is a property of this allocator and not of the step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    base = recipe.load("nano")
    of_a_row = {"steps": 1, "batch_rows": 1, "microbatch_rows": 1, "clip": 0.0}
    settings = LearnSettings.published(**of_a_row, optimiser=optimiser)  # type: ignore[arg-type]
    config = base.model_copy(
        update={
            "model": base.model.model_copy(update={"source": str(tmp_path)}),
            "data": base.data.model_copy(update={"context_length": length}),
        }
    )
    learn = base.learn["leap"].model_copy(update={"settings": settings, "workers": 1})
    sizes = measure(config)
    planned = worker_memory(learn, config.model.dtype, config.data.context_length, sizes)
    # The frozen model is there before and after, and nothing is gathered in a single process: a layer's own needs are.
    frozen = next(value for part, value in planned.items() if part.startswith("weights"))
    assert float(done.stdout.strip().splitlines()[-1]) * sizes.prunable == pytest.approx(
        sum(planned.values()) - frozen, rel=0.2
    )
