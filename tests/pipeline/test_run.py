"""The whole pipeline on a tiny model, as a user starts it: results, what a second run does, and what kills survive."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from browser import free_port
from conftest import ROOT, Command, finish
from damage import flipped
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from leap.packed import MaskFile
from pipeline import formatting
from pipeline.artifacts.logit_checkpoint import Checkpoint
from pipeline.run import main
from pipeline.tracking.sync import sync

pytestmark = [pytest.mark.ray, pytest.mark.slow]


#: The run that is never interrupted also fits weights to the learned mask and measures its speed.
EXTRAS = ("reconstruct=[leap]", "benchmark={tokens: 3, rounds: 1, seconds: 0.02}")


@pytest.fixture(scope="module")
def finished(run_command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output directory of one uninterrupted run, and what it printed."""
    output = tmp_path_factory.mktemp("finished")
    return output, finish(run_command(output, *EXTRAS))


def _results(output: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((output / "tiny" / "results.json").read_text())


def _one(output: Path, pattern: str) -> Path:
    (found,) = (output / "tiny").glob(pattern)
    return found


def _logits(output: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(str(_one(output, "learn/leap@0.5-*") / "checkpoints"))
    assert checkpoint.step == 120
    return {name: checkpoint.logits(name) for name in checkpoint.shapes}


def test_a_run_ends_with_a_table_a_report_and_exact_sparsity(finished: tuple[Path, str]) -> None:
    output, text = finished
    results = _results(output)
    assert [v["name"] for v in results["variants"]] == [
        "dense",
        "magnitude@0.5",
        "wanda@0.5",
        "leap@0.5",
        "leap+weights@0.5",
    ]
    for variant in results["variants"]:
        assert variant["name"] in text
        assert variant["perplexity"]["words"]["perplexity"] > 1
        assert variant["tasks"]["cloze"]["documents"] == 12
    assert "Report: " in text
    assert "mlflow ui" in text
    page = (output / "tiny" / "report.html").read_text()
    assert "leap@0.5" in page
    leap, fitted = results["variants"][-2:]
    assert leap["real_sparsity"] == fitted["real_sparsity"] == 0.5
    assert leap["block_sparsity"] == fitted["block_sparsity"] == 0.5, "all of the blocks is prunable"
    assert (leap["weights_changed"], fitted["weights_changed"]) == (False, True)
    assert fitted["seconds"] >= leap["seconds"]
    against = leap["against"][leap["rival"]]
    assert against["nll"]["words"]["pairs"] == 32
    assert against["mean_accuracy"] == against["tasks"]["cloze"]
    assert results["chance"] == {"cloze": 0.25}
    assert "difference of" in text
    assert results["training"]["leap@0.5"]["step"] == list(range(120))


def test_the_learned_mask_has_its_speed_in_results_report_and_tracking(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    results = _results(output)
    measured = {v["name"]: v["speed"] for v in results["variants"] if "speed" in v}
    assert list(measured) == ["leap@0.5"]
    assert set(measured["leap@0.5"]["decode"]) == {"bfloat16", "float32"}
    speed = {v["name"]: v.get("decode_tokens_per_second") for v in results["variants"]}
    assert speed["leap@0.5"] == measured["leap@0.5"]["decode"]["float32"]["sparse"]["tokens_per_second"]
    assert speed["dense"] == measured["leap@0.5"]["decode"]["float32"]["dense"]["tokens_per_second"]
    assert speed["wanda@0.5"] is None
    assert "<h2>Speed</h2>" in (output / "tiny" / "report.html").read_text()
    assert any(stage["name"] == "benchmark/leap@0.5" for stage in results["stages"])
    _, runs = _runs(output)
    metrics = next(run.data.metrics for run in runs if run.info.run_name == "leap@0.5")
    assert metrics["decode_tokens_per_second"] == pytest.approx(speed["leap@0.5"])
    assert {"decode_speedup.bfloat16", "decode_speedup.float32", "layers_speedup.float32"} <= set(metrics)
    assert main(["compare", "--runs", str(output)]) == 0
    capsys.readouterr()
    assert "decode tokens/s" in (output / "compare.html").read_text()


def test_the_export_is_the_masked_model(finished: tuple[Path, str], tiny: Path) -> None:
    output, _ = finished
    export = _one(output, "harden/leap@0.5-*")
    masks = MaskFile(export / "masks.leap")
    dense = AutoModelForCausalLM.from_pretrained(tiny / "model")
    pruned = AutoModelForCausalLM.from_pretrained(export)
    kept = 0
    for name, mask in masks.items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(pruned.get_submodule(name).weight, weight * mask)
        kept += int(mask.sum())
    assert kept == sum(m.numel() for _, m in masks.items()) - round(0.5 * sum(m.numel() for _, m in masks.items()))
    assert masks.about["method"] == "leap"


def test_fitted_weights_have_the_learned_mask(finished: tuple[Path, str]) -> None:
    output, _ = finished
    learned, fitted = (_one(output, f"harden/{name}@0.5-*") for name in ("leap", "leap+weights"))
    masks = dict(MaskFile(learned / "masks.leap").items())
    model, new = AutoModelForCausalLM.from_pretrained(learned), AutoModelForCausalLM.from_pretrained(fitted)
    for name, mask in MaskFile(fitted / "masks.leap").items():
        assert torch.equal(mask, masks[name])
        weight = new.get_submodule(name).weight
        assert not weight[~mask].any()
        assert not torch.equal(weight, model.get_submodule(name).weight)


def test_mlflow_has_the_run_and_its_children(finished: tuple[Path, str]) -> None:
    output, _ = finished
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("leap").experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    names = {r.info.run_name for r in runs} - {parents[0].info.run_name}
    assert {"learn/leap@0.5", "dense", "wanda@0.5", "leap@0.5"} <= names
    learned = next(r for r in runs if r.info.run_name == "learn/leap@0.5")
    tags = learned.data.tags
    assert (tags["stage"], tags["method"], tags["sparsity"], tags["seed"]) == ("learn", "leap", "0.5", "0")
    assert len(tags["recipe_fingerprint"]) == len(tags["dataset_fingerprint"]) == 16
    assert {d.dataset.name for d in parents[0].inputs.dataset_inputs} == {"words", "heldout", "calibration"}
    metrics = parents[0].data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    rows = {v["name"]: v for v in _results(output)["variants"]}
    assert metrics["perplexity.words/leap 0.5"] == rows["leap@0.5"]["perplexity"]["words"]["perplexity"]
    assert metrics["acc.mean/dense"] == rows["dense"]["mean_accuracy"]["acc"]
    assert len(client.get_metric_history(learned.info.run_id, "loss")) == 120
    assert any(a.path == "report.html" for a in client.list_artifacts(parents[0].info.run_id))


def test_runs_are_compared_on_the_terminal_and_as_a_page(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    assert main(["compare", "--runs", str(output)]) == 0
    out = capsys.readouterr().out
    page = (output / "compare.html").read_text()
    leap = _results(output)["variants"][-1]["perplexity"]["words"]["perplexity"]
    for text in ("dense", "wanda@0.5", "leap@0.5", "words ppl", "50.00", formatting.perplexity(leap)):
        assert text in out
        assert text in page
    assert main(["compare", "tags.method = 'wanda'", "--runs", str(output)]) == 0
    assert "leap@0.5" not in capsys.readouterr().out
    for arguments, said in (
        (["tags.method = "], "error: filter 'tags.method = '"),
        (["tags.method = 'none'"], "no measured variant"),
        (["--experiment", "other"], "error: --experiment other: there is none"),
        (["--runs", str(output / "tiny")], "no mlflow.db there"),
    ):
        assert main(["compare", "--runs", str(output), *arguments]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_a_second_run_does_nothing_twice(finished: tuple[Path, str], run_command: Command) -> None:
    output, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (output / "tiny").rglob("manifest.json")}
    finish(run_command(output, *EXTRAS))
    assert {p: p.stat().st_mtime_ns for p in (output / "tiny").rglob("manifest.json")} == before
    assert all(stage["cached"] for stage in _results(output)["stages"] if "/" in stage["name"])


def test_one_changed_field_runs_what_depends_on_it(finished: tuple[Path, str], run_command: Command) -> None:
    output, _ = finished
    finish(run_command(output, *EXTRAS, "evaluate.documents=6"))
    fresh = {stage["name"] for stage in _results(output)["stages"] if "/" in stage["name"] and not stage["cached"]}
    variants = ("dense", "magnitude@0.5", "wanda@0.5", "leap@0.5", "leap+weights@0.5")
    assert fresh == {f"evaluate/{variant}.cloze" for variant in variants}


#: One file of each kind of artefact that a run leaves.
ARTEFACTS = [
    "calibrate/calibration-*/rows-*.parquet",
    "prior/wanda@0.5-*/block-0001.safetensors",
    "learn/leap@0.5-*/checkpoints/step-000120.json",
    "reconstruct/*/block-0000.safetensors",
    "harden/leap@0.5-*/model.safetensors",
    "harden/wanda@0.5-*/masks.leap",
    "evaluate/leap@0.5.words-*/result.json",
    "evaluate/leap@0.5.map-*/density.safetensors",
]


@pytest.mark.long
def test_what_is_damaged_is_named_and_made_anew_as_it_was(
    finished: tuple[Path, str], run_command: Command, tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    shutil.copytree(finished[0], output)
    root, rng = output / "tiny", random.Random(0)
    kept = [path for path in root.rglob("*") if path.suffix in (".parquet", ".safetensors")]
    before = {path: path.read_bytes() for path in kept if "step-000110" not in path.parts}
    damaged = [next(root.glob(pattern)) for pattern in ARTEFACTS]
    for path in damaged:
        path.write_bytes(flipped(path.read_bytes(), rng.randrange(8 * path.stat().st_size)))
    text = finish(run_command(output, *EXTRAS))
    for path in damaged:
        assert f"{path} is missing, cut off or altered" in text
    assert "learning continues from step 110" in text
    assert [path for path, content in before.items() if path.read_bytes() != content] == []
    perplexities = [
        {v["name"]: v["perplexity"] for v in _results(place)["variants"]} for place in (finished[0], output)
    ]
    assert perplexities[0] == perplexities[1]


def _wait_for_checkpoint(process: subprocess.Popen[str], output: Path) -> int:
    """Wait until training has saved something and is not done; returns the step."""
    deadline = time.time() + 300
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()[0][-3000:]
        for latest in sorted((output / "tiny").glob("learn/leap@0.5-*/checkpoints/step-*.json"), reverse=True):
            step = json.loads(latest.read_text())["step"]
            assert step < 120, "too late to interrupt"
            return step
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time")


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


def _same_logits(a: Path, b: Path) -> None:
    first, second = _logits(a), _logits(b)
    assert first.keys() == second.keys()
    for name in first:
        assert second[name].isfinite().all()
        assert torch.equal(first[name], second[name]), name


def _runs(output: Path) -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name("leap").experiment_id])


def _statuses(output: Path) -> list[str]:
    _, runs = _runs(output)
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 1
    return [run.info.status for run in runs]


def _learned_run(output: Path) -> tuple[MlflowClient, Any]:
    client, runs = _runs(output)
    (learned,) = [run for run in runs if run.info.run_name == "learn/leap@0.5"]
    return client, learned


def test_a_terminated_run_says_so_and_loses_nothing_finished(run_command: Command, tmp_path: Path) -> None:
    process = run_command(tmp_path, "evaluate.cloze=null")
    _wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    last = finish(process, code=130).strip().splitlines()[-1]
    assert last == "interrupted; run the same command again to continue"
    _, runs = _runs(tmp_path)
    states = {run.info.run_name: run.info.status for run in runs}
    assert states["learn/leap@0.5"] == "KILLED"
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "KILLED"
    assert parent.data.tags["mlflow.note.content"] == "KILLED: terminated by SIGTERM"
    assert states["calibrate"] == states["prior"] == "FINISHED"
    assert len(list((tmp_path / "tiny").glob("calibrate/*/manifest.json"))) == 3


def test_a_killed_worker_is_replaced_and_nothing_changes(
    finished: tuple[Path, str], run_command: Command, tmp_path: Path
) -> None:
    process = run_command(tmp_path, "evaluate.cloze=null")
    _wait_for_checkpoint(process, tmp_path)
    workers = [p for p in _family(process) if "ray::RayTrainWorker" in _title(p)]
    assert len(workers) == 2, [_title(p) for p in _family(process)]
    workers[0].send_signal(signal.SIGKILL)
    finish(process)
    _same_logits(finished[0], tmp_path)


def test_a_killed_driver_continues_from_its_checkpoint(
    finished: tuple[Path, str], run_command: Command, tmp_path: Path
) -> None:
    process = run_command(tmp_path, "evaluate.cloze=null")
    _wait_for_checkpoint(process, tmp_path)
    family = _family(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)
    assert not (_one(tmp_path, "learn/leap@0.5-*") / "manifest.json").exists()
    assert set(_statuses(tmp_path)) == {"RUNNING", "FINISHED"}
    ((_, _, left),) = sync(tmp_path, None)
    assert left == []
    assert set(_statuses(tmp_path)) == {"KILLED", "FINISHED"}
    text = finish(run_command(tmp_path, "evaluate.cloze=null"))
    assert "continues at step" in text
    assert set(_statuses(tmp_path)) == {"FINISHED"}
    client, learned = _learned_run(tmp_path)
    steps = [metric.step for metric in client.get_metric_history(learned.info.run_id, "loss")]
    assert sorted(steps) == list(range(120)), "every step once, whoever did it"
    _same_logits(finished[0], tmp_path)


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(run_command: Command, tmp_path: Path) -> None:
    text = finish(run_command(tmp_path, "learn.leap.settings.density.weight=1e300"), code=2)
    last = text.strip().splitlines()[-1]
    assert "the loss is" in last
    assert "at step" in last
    assert "checkpoint" in last
    _, learned = _learned_run(tmp_path)
    assert learned.info.status == "FAILED"
    assert "the loss is" in learned.data.tags["mlflow.note.content"]


def test_json_lines_and_a_tracking_server_that_is_not_there(finished: tuple[Path, str], tiny: Path) -> None:
    output, _ = finished
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "run", "--json", "--recipe", str(tiny / "tiny.yaml")]
    address = f"http://user:pass@w/ord with blanks@127.0.0.1:{free_port()}"
    command += [f"output={output}", f"tracking.uri={address!r}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert done.stderr.count("is away, the run goes on and keeps its records") == 1
    events = [json.loads(line) for line in done.stdout.splitlines()]
    stages = [event["stage"] for event in events if event["event"] == "stage" and event["state"] == "finished"]
    assert stages == ["calibrate", "prior", "learn", "harden", "evaluate", "report"], "no stage without work"
    assert events[-1]["event"] == "result"
    assert [row["name"] for row in events[-1]["variants"]] == ["dense", "magnitude@0.5", "wanda@0.5", "leap@0.5"]
    assert "records wait for python pipeline/run.py sync" in events[-1]["tracking"]["note"]
    # Its password is in no file, and was not told.
    for secret in (b"pass@w", b"ord with blanks", b"ord+with+blanks", b"ord%20with%20blanks"):
        assert secret.decode() not in done.stdout + done.stderr
        holders = [file for file in output.rglob("*") if file.is_file() and secret in file.read_bytes()]
        assert not holders
    assert "***@127.0.0.1" in done.stdout
