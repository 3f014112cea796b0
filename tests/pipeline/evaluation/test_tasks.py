"""Finding tasks by name or path, groups, and the local copies of the zero-shot sets."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.evaluation import tasks
from pipeline.evaluation.tasks import resolve_task
from pipeline.evaluation.zero_shot import zero_shot

DATA = Path(os.environ.get("LEAP_DATA") or ROOT.parent / "shared" / "data")
YAML = DATA / "eval" / "yaml"
RUN = {"batch_size": "auto", "device": "cpu", "max_length": 128, "seed": 0}
needs_shared_data = pytest.mark.skipif(
    not YAML.is_dir(), reason=f"the zero-shot sets are not in {DATA}/eval; $LEAP_DATA names another folder"
)

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: sets/{name}.jsonl}}}}
{extra}
include: common.txt
"""
COMMON = """\
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: ["yes", "no", "perhaps"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.fixture
def folder(tmp_path):
    """Tasks one (6 documents), two (2) and three (4); the group all = the tag some (two, three) and one."""
    (tmp_path / "sets").mkdir()
    directory = tmp_path / "deep" / "yaml"
    directory.mkdir(parents=True)
    (directory / "common.txt").write_text(COMMON)
    for name, size, extra in (("one", 6, ""), ("two", 2, "tag: some"), ("three", 4, "tag: [some, other]")):
        (directory / f"{name}_file.yaml").write_text(TASK.format(name=name, extra=extra))
        lines = [{"question": f"Is {index} {name}?", "answer": index % 3} for index in range(size)]
        (tmp_path / "sets" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "all.yaml").write_text("group: all\ntask: [some, one]\n")
    return directory


def names(resolved):
    return [entry["task"] for entry in resolved.entries]


def test_names_in_a_folder(folder):
    assert names(resolve_task(folder / "one_file.yaml")) == ["one"]
    assert names(resolve_task(f"{folder}/one")) == ["one"]
    assert names(resolve_task(folder / "some")) == ["three", "two"]
    assert resolve_task(folder / "all.yaml") == resolve_task(folder) == resolve_task(f"{folder}/all")
    assert resolve_task(folder).name == "all"
    assert names(resolve_task(folder)) == ["three", "two", "one"]


def test_data_files_become_absolute(folder):
    (entry,) = resolve_task(folder / "one").entries
    assert entry["dataset_kwargs"]["data_files"] == {"test": str(folder.parents[1] / "sets" / "one.jsonl")}
    (folder.parents[1] / "sets" / "one.jsonl").unlink()
    with pytest.raises(ValueError, match=r"one_file\.yaml: data file sets/one\.jsonl exists neither"):
        resolve_task(folder / "one")


def test_unknown_local_names(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no task 'tow' in .*/yaml \(6 are: all, one, other, some, three, two\)"):
        resolve_task(folder / "tow")
    with pytest.raises(ValueError, match="no such folder holds no lm-eval YAML files"):
        resolve_task(tmp_path / "no such folder" / "x")
    with pytest.raises(ValueError, match="sets holds no lm-eval YAML files"):
        resolve_task(tmp_path / "sets")


def test_unsupported_files_are_named(folder):
    (folder / "all.yaml").write_text("group: all\ntask: [{task: one, num_fewshot: 3}]\n")
    with pytest.raises(ValueError, match=r"all\.yaml: a local group can only list names"):
        resolve_task(folder / "all")
    (folder / "all.yaml").write_text("group: all\ntask: [none]\n")
    with pytest.raises(ValueError, match="the member 'none', which no YAML file"):
        resolve_task(folder / "all")
    (folder / "all.yaml").unlink()
    with pytest.raises(ValueError, match=r"several tasks, name one as .*/yaml/NAME: one, three, two"):
        resolve_task(folder)
    (folder / "broken.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not an lm-eval task file"):
        resolve_task(folder / "one")


def test_unknown_registered_name(monkeypatch):
    # The real registry takes some 20 s to build.
    known = ["piqa", "hellaswag", "winogrande", *(f"mmlu_{i}" for i in range(20))]
    monkeypatch.setattr(tasks, "_registry", lambda: SimpleNamespace(all_tasks=known))
    assert resolve_task("piqa").entries == ("piqa",)
    with pytest.raises(ValueError, match=r"no task 'hellaswga' is registered .* \(closest of 23: hellaswag\)"):
        resolve_task("hellaswga")
    with pytest.raises(ValueError, match=r"23 are: piqa, hellaswag, .*, \.\.\."):
        resolve_task("xyz")


def test_a_group_is_the_mean_over_its_documents(folder, model, tokenizer):
    result = zero_shot(model, tokenizer, folder, limit=None, **RUN)
    assert (result["task"], result["documents"], result["truncated"]) == ("all", 12, 0)
    scores = {"one": [], "two": [], "three": []}
    for document in result["per_document"]:
        scores[document["task"]].append(document["scores"]["acc"])
    assert [len(scores[name]) for name in ("one", "two", "three")] == [6, 2, 4]
    total = sum(sum(values) for values in scores.values())
    assert result["metrics"]["acc"] == pytest.approx(total / 12)
    spread = 0.0
    for values in scores.values():
        mean = sum(values) / len(values)
        spread += len(values) * sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert result["metrics"]["acc_stderr"] == pytest.approx(math.sqrt(spread) / 12)

    # Each subject has its own limit; two skipped documents of three subjects are one of each.
    result = zero_shot(model, tokenizer, folder, limit=2, skip_first=2, **RUN)
    assert sorted(document["task"] for document in result["per_document"]) == ["one", "one", "three", "three", "two"]
    assert all(document["doc"] > 0 for document in result["per_document"])


def test_a_task_that_is_not_scored_by_accuracy(folder, model, tokenizer):
    text = (folder / "common.txt").read_text()
    (folder / "common.txt").write_text(text.replace("metric: acc,", "metric: brier_score,"))
    with pytest.raises(ValueError, match="task one: one is a multiple_choice task with the metrics brier_score"):
        zero_shot(model, tokenizer, folder / "one", limit=None, **RUN)


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("piqa_local", {"acc", "acc_norm"}),
        ("arc_challenge_local", {"acc", "acc_norm"}),
        ("winogrande_local", {"acc"}),
        ("mmlu_local_social_sciences_tasks", {"acc"}),
    ],
)
def test_local_copies_of_the_zero_shot_sets(name, metrics, model, tokenizer):
    limit = 1 if name.startswith("mmlu") else 5
    result = zero_shot(model, tokenizer, YAML / name, limit=limit, **RUN)
    assert result["documents"] == (12 if limit == 1 else 5)
    assert result["metrics"].keys() == metrics | {f"{metric}_stderr" for metric in metrics}
    assert result["truncated"] > 0 or name == "winogrande_local"
    json.dumps(result, allow_nan=False)


@needs_shared_data
def test_the_local_mmlu_has_its_57_subjects():
    resolved = resolve_task(YAML / "mmlu_local.yaml")
    assert len(resolved.entries) == len(set(names(resolved))) == 57
    for entry in resolved.entries:
        assert all(Path(file).is_file() for file in entry["dataset_kwargs"]["data_files"].values())
