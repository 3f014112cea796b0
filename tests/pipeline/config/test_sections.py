"""What a configuration may hold, and what the recipes that come with the project say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from leap.settings import LearnSettings
from pipeline.config import CorpusConfig, EvaluateConfig, ModelConfig, RunConfig, dtypes, paths, recipe
from pipeline.config.fields import SECTION, all_fields, known_key

GPU = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
}


def test_every_field_has_help_and_is_listed_once() -> None:
    fields = list(all_fields())
    assert [f.name for f in fields if not f.help] == []
    names = [f.name for f in fields]
    assert len(set(names)) == len(names)
    for name in ("sparsities", "data.evaluation.NAME.tokens", "evaluate.cloze.questions"):
        assert name in names
    settings = {f"learn.NAME.settings.{f.name}" for f in dataclasses.fields(LearnSettings)}
    assert settings <= set(names)


def test_fields_show_type_limits_and_the_default_of_their_place() -> None:
    fields = {f.name: f for f in all_fields()}
    assert fields["data.context_length"].type == "int > 1"
    assert fields["sparsities"].type == "list of float ≥ 0 < 1"
    assert fields["evaluate.batch_size"].type == "int > 0 | auto"
    assert fields["prior.scope"].type == "native | row | layer | list of native | row | layer"
    assert fields["evaluate.cloze"].type == f"{SECTION} | none"
    assert fields["data.calibration.share"].default == (76, 88)
    assert fields["data.heldout.share"].default == (88, 92)
    assert fields["learn.NAME.settings.family.scale.start"].default == 1.0
    assert fields["learn.NAME.settings.family.temperature.start"].help == "Value at the first step."


@pytest.mark.parametrize(
    ("place", "known"),
    [
        (["evaluate", "batch_size", "int"], ["evaluate", "batch_size"]),
        (["sparsities", "1"], ["sparsities", "1"]),
        (["data", "evaluation", "c4", "source", "list[str]", "0"], ["data", "evaluation", "c4", "source"]),
        (["evaluate", "documents_of", "piqa", "constrained-int"], ["evaluate", "documents_of", "piqa"]),
        (
            ["learn", "leap", "settings", "family", "leap", "scale"],
            ["learn", "leap", "settings", "family", "scale"],
        ),
    ],
)
def test_the_key_of_an_error_is_one_that_can_be_written(place: list[str], known: list[str]) -> None:
    assert known_key(place)[0] == known


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"share": (50, 50)}, "two rising numbers"),
        ({"share": (-1, 50)}, "two rising numbers"),
        ({"source": []}, "files, not"),
        ({"source": ["a.txt", "embedded"]}, "files, not"),
        ({"source": ["hub:a/b"]}, "files, not"),
        ({"tokens": 0}, "greater than 0"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CorpusConfig.model_validate(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"learn": {"dense": {}}}, r"learn\.dense"),
        ({"learn": {"wanda": {}}}, r"learn\.wanda"),
        ({"learn": {"a/b": {}}}, r"learn\.a/b"),
        ({"data": {"evaluation": {"heldout": {}}}}, r"data\.evaluation\.heldout"),
        ({"data": {"evaluation": {"piqa": {}}}, "evaluate": {"tasks": ["piqa"]}}, r"data\.evaluation\.piqa"),
        ({"prior": {"methods": ["wanda", "wanda"]}}, "different names"),
        ({"evaluate": {"tasks": ["piqa", "piqa"]}}, "different names"),
        ({"evaluate": {"tasks": ["piqa"], "documents_of": {"mmlu": 1}}}, "mmlu is none of the tasks"),
        ({"sparsities": []}, "one or more"),
        (
            {"learn": {"leap": {"settings": {"family": {"pattern": [2, 4]}}}}},
            r"learn\.leap makes 2:4 masks: set prior\.pattern=\[2, 4\]",
        ),
        (
            {
                "learn": {"leap": {"nested": True, "settings": {"family": {"kind": "maskllm"}}}},
                "prior": {"pattern": [2, 4]},
                "sparsities": [0.5],
            },
            "nested wants masks whose sparsity is shared over the model, and it is by 2:4",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"name": "x", **value})


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: avx512_bf16 amx_bf16 amx_tile\n", "bfloat16"),
        ("flags\t\t: avx512_bf16\n", "float32"),
        ("Features\t: bf16\n", "float32"),
        (None, "float32"),
    ],
)
def test_auto_is_the_number_type_of_the_cpus_matrix_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, dtype: str
) -> None:
    monkeypatch.setattr(dtypes, "_CPU", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + flags)
    assert ModelConfig.model_validate({"dtype": "auto"}).dtype == dtype
    assert ModelConfig.model_validate({"dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(ValidationError, match="float16"):
        ModelConfig.model_validate({"dtype": "int8"})


def test_a_task_can_have_a_number_of_documents_of_its_own() -> None:
    evaluate = EvaluateConfig(tasks=["piqa", "mmlu", "arc"], documents=40, documents_of={"mmlu": 1, "arc": None})
    assert evaluate.documents_for("piqa") == 40
    assert evaluate.documents_for("mmlu") == 1
    assert evaluate.documents_for("/some/where/mmlu") == 1
    assert evaluate.documents_for("arc") is None


def test_a_variable_stands_for_what_the_environment_says_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAP_DATA", raising=False)
    assert paths.expand_variables("$LEAP_DATA/text") == "$LEAP_DATA/text"
    monkeypatch.setenv("LEAP_DATA", "/elsewhere")
    assert paths.expand_variables("${LEAP_DATA}/text") == "/elsewhere/text"
    assert paths.expand_variables("$NOBODY_SETS_THIS/x") == "$NOBODY_SETS_THIS/x"


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_loads_and_says_why(name: str) -> None:
    config = recipe.load(name)
    assert config.name == name
    assert config.why
    assert config.learn


def test_the_bases_are_not_listed() -> None:
    assert {*GPU, *(f"{name}-paper" for name in GPU), "nano", "smollm2"} <= set(recipe.names())
    assert not {"base", "gpu", "gpu-paper", "short"} & set(recipe.names())


@pytest.mark.parametrize("path", sorted(recipe.DIRECTORY.glob("*.yaml")), ids=lambda p: p.stem)
def test_no_recipe_repeats_what_it_inherits(path: Path) -> None:
    own = yaml.safe_load(path.read_text())
    inherited: dict[str, Any] = {}
    parent = own.get("base")
    while parent:
        above = yaml.safe_load((recipe.DIRECTORY / f"{parent}.yaml").read_text())
        inherited = recipe.merge(above, inherited)
        parent = above.get("base")
    inherited.pop("base", None)
    assert _repeated(own, inherited) == []


def _repeated(own: Any, inherited: Any, key: str = "") -> list[str]:
    if isinstance(own, dict) and isinstance(inherited, dict):
        return [found for k in own if k in inherited for found in _repeated(own[k], inherited[k], f"{key}.{k}")]
    return [key] if own == inherited else []


@pytest.mark.parametrize("name", GPU)
def test_gpu_recipes_learn_with_the_best_settings_from_some_ten_million_tokens(name: str) -> None:
    config = recipe.load(name)
    learn = config.learn["leap"]
    assert config.model.source == GPU[name]
    s = dataclasses.replace(learn.settings, steps=LearnSettings().steps, batch_rows=LearnSettings().batch_rows)
    assert s == LearnSettings()
    tokens = learn.settings.steps * learn.settings.batch_rows * config.data.context_length
    assert config.data.calibration.tokens == tokens
    assert 10e6 <= tokens <= 50e6
    paper = recipe.load(f"{name}-paper")
    assert learn.model_copy(update={"published": True, "settings": None}) == paper.learn["leap-paper"].model_copy(
        update={"settings": None}
    )
    assert (paper.model, paper.prior, paper.evaluate) == (config.model, config.prior, config.evaluate)


@pytest.mark.parametrize("name", GPU)
def test_gpu_recipes_of_the_paper_are_leap_as_published(name: str) -> None:
    config = recipe.load(f"{name}-paper")
    assert list(config.learn) == ["leap-paper"]
    learn = config.learn["leap-paper"]
    s, f = learn.settings, learn.settings.family
    assert config.model.source == GPU[name]
    assert config.model.dtype == "bfloat16"
    assert (s.steps, s.batch_rows, config.data.context_length) == (2000, 256, 4096)
    assert config.data.calibration.tokens == 2000 * 256 * 4096
    assert config.data.calibration.source == "hub:DKYoon/SlimPajama-6B"
    assert (f.scale.start, f.scale.end, f.temperature.start, f.temperature.end) == (25, 350, 4, 0.05)
    assert f.scale.shape == f.temperature.shape == "linear"
    assert (s.density.kind, s.density.weight, s.density.of, s.weight_reward) == ("penalty", 7, "sampled", 10)
    assert (s.learning_rate, s.warmup_steps, s.betas, s.final_rate) == (1e-3, 5, (0.9, 0.95), 0)
    assert (s.prior, f.strength, f.init_std, f.noise, s.distillation) == ("wanda", 3, 0.014, True, 0)
    assert config.prior.rows == 128
    assert learn.gpu
    assert learn.activation_checkpointing
    assert learn.workers == (8 if name == "llama-3.1-8b" else 4)
    assert config.evaluate.tasks == ["piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "mmlu"]
    assert config.evaluate.documents is None
