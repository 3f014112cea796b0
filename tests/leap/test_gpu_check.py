"""The GPU check in its smoke mode: every step runs, an error or a hang loses one step, and the exit code says so."""

import json
import time

import pytest
import torch
from leap_kernels.benchmarks import checkrun
from safetensors.torch import save_file

from leap.benchmarks import budgets, gpu_check, gpu_curve


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def records(directory, name="gpu_check"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_smoke_runs_every_step(tmp_path, no_gpu):
    assert gpu_check.main(["--smoke", "--out", str(tmp_path), "--budget", "300"]) == 0
    found = records(tmp_path)
    assert [r["step"] for r in found if r["name"] == "step done"] == [step.name for step in gpu_check.STEPS]
    assert not [r for r in found if r.get("passed") is False or "left out" in r["name"]]
    names = {r["name"] for r in found}
    assert {"ceilings", "product 64x300 bfloat16", "Adam float32", "losses backward", "prune nano on cpu"} <= names
    assert "decode smoke 60% batch 16, eager" in names
    assert "step smoke, masked, deterministic, adam8bit" in names


def test_without_a_gpu_it_says_what_to_do(tmp_path, no_gpu, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert gpu_curve.main(["--out", str(tmp_path), "--model", "x", "--rows", "y"]) == 2
    assert "--smoke" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_error_loses_one_step(tmp_path, no_gpu, monkeypatch):
    def broken(run, rates):
        run.figure("before")
        raise RuntimeError("illegal access")

    steps = (gpu_check.Step("a", 1, broken), gpu_check.Step("b", 1, lambda run, _: run.figure("reached")))
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert gpu_check.main(["--smoke", "--out", str(tmp_path), "--budget", "60"]) == 1
    names = [r["name"] for r in records(tmp_path)]
    assert names == ["before", checkrun.LOST, "step done", "reached", "step done", "failed checks"]


def test_a_hang_ends_in_a_new_process_with_the_steps_that_are_left(tmp_path, no_gpu, monkeypatch):
    started = []
    monkeypatch.setattr(gpu_check.os, "execv", lambda _, command: started.append(command))
    given = gpu_check.arguments(["--smoke", "--out", str(tmp_path), "--budget", "60"])
    run = checkrun.CheckRun(torch.device("cpu"), True, checkrun.Records(tmp_path / "x.jsonl"), "ceilings", 0.0)
    gpu_check.watchdog(run, ["products", "prune"], given, time.monotonic(), 1.0, hang=0.01).join()
    assert run.failed == [f"ceilings: {checkrun.LOST}"]
    assert started[0][-3:] == ["--steps", "products", "prune"]
    again = gpu_check.arguments(started[0][3:])
    assert (again.budget, again.smoke, again.steps) == (60, True, ["products", "prune"])
    assert again.goes_on[1] == 2  # the check that failed before, and the step that hung


def test_settings_follow_from_the_budget():
    few, many, more = (budgets.settings_for(n, 512, 0.01) for n in (300_000, 9_300_000, 50_000_000))
    assert (few.batch_rows, few.steps) == (4, 146)
    assert (many.batch_rows, many.steps) == (121, 150)
    assert (more.batch_rows, more.steps) == (128, 763)
    for tokens, settings in ((300_000, few), (9_300_000, many), (50_000_000, more)):
        assert settings.steps * settings.batch_rows * 512 == pytest.approx(tokens, rel=0.01)


def test_the_curve_measures_points_and_leaves_the_model_as_it_was(tmp_path, tiny, no_gpu):
    rows = {name: torch.randint(0, 60, (16, 32)).to(torch.uint16) for name in ("calibration", "wikitext2")}
    save_file(rows, tmp_path / "rows.safetensors")
    command = ["--smoke", "--model", str(tiny / "model"), "--rows", str(tmp_path / "rows.safetensors")]
    command += ["--out", str(tmp_path), "--points", "0.6:300000", "0.5:300000:0.02"]
    assert gpu_curve.main(command) == 0
    found = {r["name"]: r for r in records(tmp_path, "gpu_curve")}
    assert list(found) == ["dense", "admm 0.6", "leap 0.6", "admm 0.5", "leap 0.5"]
    assert all(record["perplexity.wikitext2"] > 1 for record in found.values())
    point = found["leap 0.5"]
    assert (point["rate"], point["tokens"], point["distinct_tokens"], point["passes"]) == (0.02, 2048, 512, 4)
