"""Recipes: inheritance, overrides, and what a partly given section means."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap.families import FAMILIES, MaskLLM
from leap.settings import DensityControl, LearnSettings
from pipeline.config import LearnConfig, RunConfig, renamed
from pipeline.config.fields import all_fields
from pipeline.config.recipe import load, merge, names
from pipeline.errors import UserError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_merge_goes_mapping_by_mapping_and_replaces_everything_else() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merge(below, {"a": {"y": [3]}, "c": 4}) == {"a": {"x": 1, "y": [3]}, "b": 3, "c": 4}
    assert merge(below, {"a": None}) == {"a": None, "b": 3}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_a_mapping_of_another_kind_takes_nothing_from_what_it_covers() -> None:
    below = {"a": {"kind": "x", "of_x": 1}}
    assert merge(below, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}}
    assert merge(below, {"a": {"kind": "x", "more": 2}}) == {"a": {"kind": "x", "of_x": 1, "more": 2}}
    assert merge(below, {"a": {"of_x": 2}}) == {"a": {"kind": "x", "of_x": 2}}
    overrides = ["prior.pattern=[2, 4]", "sparsities=[0.5]"]
    entry = "learn.other={like: leap, settings: {family: {kind: maskllm, strength: 5}}}"
    learn = load("nano", [*overrides, entry]).learn
    assert learn["other"].settings.family == MaskLLM(strength=5)
    assert learn["other"].settings.learning_rate == learn["leap"].settings.learning_rate


@pytest.mark.parametrize("kind", FAMILIES)
def test_published_settings_are_those_of_the_family(kind: str) -> None:
    pattern = LearnSettings.published(kind).family.pattern
    overrides = ["prior.pattern=[2, 4]", "sparsities=[0.5]"] if pattern else []
    entry = f"learn.paper={{published: true, settings: {{family: {{kind: {kind}}}, steps: 7}}}}"
    learn = load("nano", [*overrides, entry]).learn["paper"]
    assert learn.settings == LearnSettings.published(kind, steps=7)


def test_a_recipe_inherits_through_several_files_and_a_file_beside_it_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "grandparent.yaml", "base: base\nseed: 1\nwhy: because\ndata: {context_length: 64, shards: 2}\n")
    write(tmp_path / "parent.yaml", "base: grandparent\nseed: 2\n")
    config = load(write(tmp_path / "child.yaml", "base: parent\ndata: {shards: 4}\n"))
    assert (config.name, config.base) == ("child", "parent")
    assert (config.seed, config.why, config.data.context_length, config.data.shards) == (2, "because", 64, 4)
    # The recipes of the project are what a name stands for otherwise.
    assert load(write(tmp_path / "own.yaml", "base: nano\nname: mine\n")).learn == load("nano").learn


def test_a_base_can_be_a_path_that_counts_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "parent.yaml", "seed: 5\n")
    assert load(write(tmp_path / "sub" / "child.yaml", "base: ../parent.yaml\n")).seed == 5


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b\n")
    write(tmp_path / "b.yaml", "base: a\n")
    with pytest.raises(UserError, match="cannot inherit from itself"):
        load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere\n", r"bad\.yaml: base nowhere: no such recipe"),
        ("- 1\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(caught.value)


def test_overrides_are_yaml_values_by_dotted_name_and_the_last_one_wins() -> None:
    config = load(
        "nano",
        [
            "sparsities=[0.25, 0.5]",
            "learn.leap.settings.learning_rate=1e-2",
            "learn.leap.settings.density.weight=3",
            "evaluate.cloze=null",
            "seed=1",
            "seed=7",
            "why=a=b",
        ],
    )
    assert config.sparsities == [0.25, 0.5]
    assert config.learn["leap"].settings.learning_rate == 0.01
    assert config.learn["leap"].settings.density.weight == 3
    assert config.learn["leap"].settings.density.kind == load("nano").learn["leap"].settings.density.kind
    assert config.evaluate.cloze is None
    assert (config.seed, config.why) == (7, "a=b")


def test_null_takes_out_an_inherited_entry() -> None:
    config = load("nano", ["learn.leap=null", "learn.other.workers=2", "data.evaluation.docs=null"])
    assert list(config.learn) == ["other"]
    assert config.data.evaluation == {}


def test_a_section_that_was_null_can_be_given_again() -> None:
    assert load("base", ["evaluate.cloze.questions=9"]).evaluate.cloze is not None


def test_the_rest_of_a_schedule_is_that_of_its_field() -> None:
    settings = load("base", ["learn.leap.settings.family.scale.start=10"]).learn["leap"].settings
    assert (settings.family.scale.start, settings.family.scale.end) == (10, 1)
    assert settings.family.temperature.start == 0.3
    settings = (
        load("base", ["learn.leap={published: true, settings: {family: {scale: {start: 10}}}}"]).learn["leap"].settings
    )
    assert (settings.family.scale.start, settings.family.scale.end) == (10, 350)


def test_published_is_what_settings_do_not_give() -> None:
    for config in (load("base", ["learn.leap.published=true"]), LearnConfig(published=True)):
        learn = config.learn["leap"] if isinstance(config, RunConfig) else config
        assert learn.settings == LearnSettings.published()
    learn = load("base", ["learn.leap={published: true, settings: {density: {weight: 3}, steps: 9}}"]).learn["leap"]
    assert learn.settings == LearnSettings.published(density=DensityControl(kind="penalty", weight=3), steps=9)
    again = load("base", ["learn.leap.published=true", "learn.more={like: leap, settings: {learning_rate: 0.01}}"])
    assert again.learn["more"].settings == LearnSettings.published(learning_rate=0.01)
    # What a run wrote down is read back as it was.
    assert RunConfig.model_validate(again.model_dump(mode="json")) == again


def test_a_partly_given_corpus_keeps_apart_what_has_to_be_kept_apart() -> None:
    data = load("base", ["data.calibration.tokens=4096", "data.evaluation.mine.tokens=4096"]).data
    assert data.calibration.share == (76, 88)
    assert data.evaluation["mine"].share == (92, 100)
    # A share of the embedded documents is not meant for the user's own.
    assert load("base", ["data.calibration.source=mine.jsonl"]).data.calibration.share == (0, 100)
    assert load("base", ["data.calibration={source: mine.jsonl, share: [0, 9]}"]).data.calibration.share == (0, 9)


def test_an_entry_of_learn_can_be_like_another() -> None:
    config = load(
        "nano", ["learn.cold.like=leap", "learn.cold.settings.family.temperature.end=0.01", "learn.far.like=cold"]
    )
    leap, cold, far = (config.learn[name] for name in ("leap", "cold", "far"))
    assert cold.settings.family.temperature.end == 0.01
    assert cold.settings.family.temperature.start == leap.settings.family.temperature.start != 4
    assert cold.checkpoint_every == leap.checkpoint_every
    assert far.settings == cold.settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learn.cold.like=warm"], "learn.cold.like: no entry warm in learn; allowed here: leap"),
        (["learn.leap.like=leap"], "learn.leap.like: an entry cannot be like itself"),
        (["learn.a.like=b", "learn.b.like=a"], "an entry cannot be like itself"),
        (["reconstruct=[cold]"], "reconstruct: cold is none of learn (leap)"),
    ],
)
def test_entries_that_do_not_exist_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load("nano", overrides)
    assert message in str(error.value)


def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^learn\.mine\.reconstruct: is now reconstruct, a list of entries of learn$"):
        load("nano", ["learn.mine={reconstruct: true}"])
    monkeypatch.setitem(renamed.FIELDS, "data.calibration.words", "data.calibration.tokens")
    with pytest.raises(UserError, match=r"^data\.calibration\.words: is now data\.calibration\.tokens$"):
        load("nano", ["data.calibration.words=5"])
    monkeypatch.setitem(renamed.RECIPES, "pico", "nano")
    with pytest.raises(UserError, match=r"^--recipe pico: this recipe is now called nano$"):
        load("pico")
    (tmp_path / "mine.yaml").write_text("base: pico\n")
    with pytest.raises(UserError, match=r"^mine\.yaml: base pico: this recipe is now called nano$"):
        load(str(tmp_path / "mine.yaml"))


def test_every_new_name_is_one_and_no_old_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {field.name for field in all_fields()}
    assert not known & renamed.FIELDS.keys()
    assert all(new.partition(",")[0] in known for new in renamed.FIELDS.values())
    assert not set(names()) & renamed.RECIPES.keys()
    assert set(renamed.RECIPES.values()) <= set(names())
