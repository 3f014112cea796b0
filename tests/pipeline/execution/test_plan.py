"""What a plan consists of, what depends on what, and the numbers that go with it."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

import pytest

from leap.families import Leap, MaskLLM
from pipeline.config import recipe
from pipeline.data import corpora
from pipeline.errors import UserError
from pipeline.execution.plan import make_plan, task_directory
from pipeline.learning.worker import Job
from pipeline.model import loading
from pipeline.model.sizes import measure
from pipeline.stages.benchmark import Benchmark
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.cost import Machine
from pipeline.stages.evaluate import Cell, Cloze, TaskAccuracy
from pipeline.stages.learn import WORKER_START, Learn, learn_seconds, training_tokens, worker_memory
from pipeline.stages.planned import Plan
from pipeline.stages.prior import Prior
from pipeline.stages.reconstruct import Reconstruct

MACHINE = Machine(cpu=1e9, gpus=False)


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the tiny recipe that put two tasks beside its cloze task."""
    output, tasks = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("tasks")
    return [
        f"output={output}",
        f"evaluate.task_directory={tasks}",
        "evaluate.tasks=[one, two]",
        "evaluate.documents_of={two: 1}",
    ]


@pytest.fixture(scope="module")
def keys(tiny: Path, base: list[str]) -> dict[str, str]:
    return keys_of(plan_of(tiny, base))


def plan_of(tiny: Path, overrides: list[str]) -> Plan:
    return make_plan(recipe.load(str(tiny / "tiny.yaml"), overrides))


def keys_of(plan: Plan) -> dict[str, str]:
    """Fingerprint of every piece of work by stage and item."""
    keys = {stage.name: stage.key for stage in plan.stages}
    assert len(keys) == len(plan.stages)
    return keys


def test_the_stages_come_in_order(keys: dict[str, str]) -> None:
    made = ["magnitude@0.5", "wanda@0.5"]
    variants = ["dense", *made, "leap@0.5"]
    assert list(keys) == [
        *(f"calibrate/{role}" for role in ("words", "heldout", "calibration")),
        *(f"prior/{item}" for item in made),
        "learn/leap@0.5",
        *(f"harden/{item}" for item in variants[1:]),
        "cloze",
        *(
            f"evaluate/{v}.{subject}"
            for v in variants
            for subject in ("words", "samples", "map", "one", "two", "cloze")
            if (v, subject) != ("dense", "map")
        ),
    ]


LEAP = ["*/leap@*"]
WANDA = ["*/wanda@*"]
#: What a change makes necessary again, as patterns over stage/item; those with ! take away.
CHANGES: dict[str, list[str]] = {
    "learn.leap.settings.learning_rate=0.02": LEAP,
    "learn.leap.settings.family.temperature.end=0.1": LEAP,
    "learn.leap.settings.density.weight=7": LEAP,
    "learn.leap.settings.prior=magnitude": LEAP,
    "learn.leap.settings.seed=1": LEAP,
    "learn.leap.seeds=[0]": [],
    "learn.leap.seeds=[1]": LEAP,
    "learn.leap.seeds=[0, 1]": ["*/leap.seed?@*"],
    "learn.leap.workers=1": [],
    "learn.leap.threads=2": [],
    "learn.leap.gpu=true": [],
    "learn.leap.activation_checkpointing=true": [],
    "learn.leap.checkpoint_every=7": [],
    "learn.leap.max_failures=0": [],
    "prior.methods=[wanda, magnitude]": [],
    "prior.methods=[magnitude, wanda, admm]": ["*/admm@*"],
    "prior.rows=8": WANDA + LEAP,
    "prior.scope=layer": ["*/wanda-layer*"],  # not where learning starts
    "prior.scope=row": [],
    "prior.scope=[row, layer]": ["*/wanda-layer*"],
    "learn.leap.settings.prior_scope=layer": ["prior/wanda-layer*", *LEAP],
    "prior.pattern=[1, 2]": ["*/magnitude@*", *WANDA, *LEAP],
    "prior.options={wanda: {any: 1}}": WANDA + LEAP,
    "prior.options={admm: {schedule: cubic}}": [],
    "prior.spill=true": [],
    "sparsities=[0.5, 0.75]": ["*@0.75*"],
    "sparsities=[0.75]": ["*@0.75*"],
    "evaluate.documents=3": ["evaluate/*.one", "evaluate/*.cloze"],
    "evaluate.documents_of.two=2": ["evaluate/*.two"],
    "evaluate.skip_first=2": ["evaluate/*.one", "evaluate/*.two", "evaluate/*.cloze"],
    "evaluate.batch_rows=4": ["evaluate/*.words"],
    "evaluate.batch_size=4": [],
    "evaluate.cloze.questions=9": ["cloze", "evaluate/*.cloze"],
    # Without a cloze task its text need not be kept; the texts that stay apart from it are the same.
    "evaluate.cloze=null": ["calibrate/words", "evaluate/*.words", "evaluate/*.samples"],
    "evaluate.samples.prompts=1": ["evaluate/*.samples"],
    "evaluate.samples=null": [],
    "data.context_length=16": [
        "*",
        "!prior/magnitude*",
        "!harden/magnitude*",
        "!evaluate/magnitude*.map",
        *(f"!evaluate/{v}.{task}" for v in ("dense", "magnitude*") for task in ("one", "two")),
    ],
    "data.calibration.tokens=2048": ["calibrate/calibration", *WANDA, *LEAP],
    "data.heldout.tokens=256": ["calibrate/heldout", "calibrate/calibration", *WANDA, *LEAP],
    "data.tokenizer_workers=1": [],
    "data.shards=3": [],
    "model.dtype=bfloat16": ["*", "!calibrate/*", "!cloze"],
    "seed=1": [
        *WANDA,
        *LEAP,
        "cloze",
        "evaluate/*",
        "!evaluate/dense.words",
        "!evaluate/magnitude*.words",
        "!*.map",
        "evaluate/[wl]*.map",
    ],
    "tracking.experiment=other": [],
    "why=other": [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_necessary_what_depends_on_it_and_nothing_else(
    tiny: Path, base: list[str], keys: dict[str, str], change: str
) -> None:
    changed = keys_of(plan_of(tiny, [*base, change]))
    again = {name for name, key in changed.items() if keys.get(name) != key}
    expected = set()
    for pattern in CHANGES[change]:
        if pattern.startswith("!"):
            expected -= set(fnmatch.filter(changed, pattern[1:]))
        else:
            found = set(fnmatch.filter(changed, pattern))
            assert found, pattern
            expected |= found
    assert again == expected


def test_several_seeds_share_the_prior_and_differ_in_the_seed_alone(tiny: Path, base: list[str]) -> None:
    plan = plan_of(tiny, [*base, "learn.leap.seeds=[3, 5]", "reconstruct=[leap]"])
    assert [learn.config.settings.seed for learn in plan.of(Learn)] == [3, 5]
    assert len({learn.prior.key for learn in plan.of(Learn)}) == 1
    learned = [(v.name, v.method, v.seed) for v in plan.variants if v.learned]
    assert learned == [
        ("leap.seed3@0.5", "leap", 3),
        ("leap+weights.seed3@0.5", "leap+weights", 3),
        ("leap.seed5@0.5", "leap", 5),
        ("leap+weights.seed5@0.5", "leap+weights", 5),
    ]


def test_the_order_of_the_rows_follows_both_seeds(tiny: Path) -> None:
    learn = recipe.load(str(tiny / "tiny.yaml")).learn["leap"]
    seeds = {
        (run, own): Job(*[None] * 2, learn.with_seed(own), 0.5, run, *[None] * 4).own_seed  # type: ignore[list-item, arg-type]
        for run in (0, 1)
        for own in (0, 1)
    }
    assert seeds[0, 0] == 0
    assert len(set(seeds.values())) == 4


def test_speed_is_measured_of_learned_masks_where_it_is_asked_for(
    tiny: Path, base: list[str], keys: dict[str, str]
) -> None:
    asked = plan_of(tiny, [*base, "reconstruct=[leap]", "benchmark={tokens: 4}"])
    assert [speed.name for speed in asked.of(Benchmark)] == ["benchmark/leap@0.5"]
    assert list(keys_of(asked))[-1] == "benchmark/leap@0.5"
    for change, again in (("benchmark.tokens=5", True), ("seed=1", True), ("prior.methods=[]", False)):
        (speed,) = plan_of(tiny, [*base, "reconstruct=[leap]", "benchmark={tokens: 4}", change]).of(Benchmark)
        assert (speed.key != asked.of(Benchmark)[0].key) == again, change
    nano = make_plan(recipe.load("nano"))
    assert 0 < (nano.of(Benchmark)[0].cost(measure(nano.config), MACHINE).seconds or 0) < 20


def test_output_and_name_move_results_and_change_none(
    tiny: Path, base: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    moved = plan_of(tiny, [*base, f"output={tmp_path}", "name=other"])
    assert keys_of(moved) == keys
    assert all(stage.directory.uri_of().startswith(f"{tmp_path}/other/") for stage in moved.stages)


def test_another_text_or_model_is_noticed_by_its_files(tiny: Path, base: list[str], tmp_path: Path) -> None:
    text, model = tmp_path / "text.jsonl", tmp_path / "model"
    shutil.copy(tiny / "text.jsonl", text)
    shutil.copytree(tiny / "model", model)
    mine = [*base, f"model.source={model}", f"data.evaluation.words.source={text}"]
    before = keys_of(plan_of(tiny, mine))
    os.utime(text, (1, 1))
    assert keys_of(plan_of(tiny, mine)) == before, "the same text"
    text.write_text(text.read_text().replace("mask", "task"))
    after = keys_of(plan_of(tiny, mine))
    assert after["calibrate/words"] != before["calibrate/words"]
    assert after["prior/magnitude@0.5"] == before["prior/magnitude@0.5"]
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-20_001, os.SEEK_END)
        file.write(b"\x07")
    changed = keys_of(plan_of(tiny, mine))
    assert all(changed[name] != after[name] for name in changed)


def test_another_local_task_is_noticed_by_its_definition_and_its_data(
    tiny: Path, base: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "shared.txt").write_text("")
    (folder / "_common.yaml").write_text("dataset_path: json\noutput_type: multiple_choice\n")
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(
            f"include: _common.yaml\ntask: {name}\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
            "process_docs: !function utils.process\n"
        )
        (folder / f"{name}.jsonl").write_text('{"question": "a"}\n')
    (folder / "utils.py").write_text("def process(docs):\n    return docs\n")
    mine = [*base, f"evaluate.task_directory={folder}"]

    def again(name: str, text: str) -> set[str]:
        """Tasks that are measured again after a change of a file."""
        before = keys_of(plan_of(tiny, mine))
        (folder / name).write_text(text)
        after = keys_of(plan_of(tiny, mine))
        return {key.rsplit(".", 1)[1] for key in after if after[key] != before[key]}

    assert again("two.jsonl", '{"question": "b"}\n') == {"two"}
    assert again("one.yaml", (folder / "one.yaml").read_text() + "num_fewshot: 1\n") == {"one"}
    assert again("_common.yaml", (folder / "_common.yaml").read_text() + "doc_to_text: question\n") == {"one", "two"}
    assert again("utils.py", "def process(docs):\n    return docs.select([0])\n") == {"one", "two"}
    assert again("shared.txt", "no task names this") == set()
    before = keys_of(plan_of(tiny, mine))
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert keys_of(plan_of(tiny, [*base, f"evaluate.task_directory={tmp_path / 'elsewhere'}"])) == before


def test_a_remote_store_is_not_touched_while_planning(tiny: Path, base: list[str], tmp_path: Path) -> None:
    plan = plan_of(tiny, [*base, f"output=memory://{tmp_path.name}"])
    (cloze,) = plan.of(Cloze)
    assert {cell.source for cell in plan.of(TaskAccuracy) if cell.subject == "cloze"} == {cloze}
    assert cloze.directory.uri_of().startswith("memory://")


def test_files_and_tasks_lie_where_leap_data_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "eval" / "yaml").mkdir(parents=True)
    config = recipe.load("smollm2")
    monkeypatch.setenv("LEAP_DATA", str(tmp_path))
    assert task_directory(config) == tmp_path / "eval" / "yaml"
    assert corpora.is_absent(config.data.heldout)
    (tmp_path / "text" / "wikipedia_heldout.jsonl").write_text('{"text": "a"}\n')
    assert corpora.expand(config.data.heldout) == [str(tmp_path / "text" / "wikipedia_heldout.jsonl")]
    assert not corpora.is_absent(config.data.heldout)


def test_some_of_several_files_are_not_taken_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    corpus = recipe.load("nano").data.calibration.model_copy(update={"source": sources, "fallback": "embedded"})
    with pytest.raises(UserError, match=r"no file matches .*b\.jsonl"):
        corpora.expand(corpus)


def test_sizes_are_those_of_the_model(tiny: Path) -> None:
    config = recipe.load(str(tiny / "tiny.yaml"))
    sizes = measure(config)
    model = loading.load_model(config.model)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    hidden, inner, key_value, vocabulary = 36, 50, 12, 400
    block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner
    assert sizes.prunable == 2 * block
    assert sizes.linear == 2 * block + vocabulary * hidden  # the head is tied to the embedding and still multiplies
    assert sizes.gram == 2 * (6 * hidden**2 + inner**2)
    assert sizes.solve == 2 * (hidden**2 * (block // hidden - inner) + inner**2 * hidden)
    assert sizes.largest == vocabulary * hidden
    assert max(matrix.shape.numel() for matrix in sizes.matrices) == inner * hidden
    # A logit a weight; or six for four, where all layers split into groups of four.
    assert sizes.layout(Leap()).numel == sizes.prunable
    with pytest.raises(ValueError, match=r"mlp\.down_proj: 50 columns do not split into groups of 4"):
        sizes.layout(MaskLLM())
    assert sizes.layout(MaskLLM(pattern=(1, 2))).numel == sizes.prunable
    assert sizes.wires == 2 * (4 * hidden + 2 * hidden + 2 * key_value + 3 * (hidden + inner))
    assert (sizes.blocks, sizes.states) == (2, 2 * hidden)
    assert sizes.vocabulary == vocabulary


def test_the_export_is_as_large_as_announced(tiny: Path) -> None:
    on_disk = (tiny / "model" / "model.safetensors").stat().st_size
    sizes = measure(recipe.load(str(tiny / "tiny.yaml")))
    assert sizes.export - sizes.prunable // 8 == pytest.approx(on_disk, rel=0.05)


def test_memory_and_time_shrink_with_workers_and_grow_with_tokens(tiny: Path) -> None:
    config = recipe.load(str(tiny / "tiny.yaml"), ["learn.leap.settings.clip=0"])
    sizes = measure(config)
    one, four = (config.learn["leap"].model_copy(update={"workers": workers}) for workers in (1, 4))
    dtype, length = config.model.dtype, config.data.context_length
    memory_one, memory_four = (worker_memory(learn, dtype, length, sizes) for learn in (one, four))
    assert memory_one["weights, float32, frozen"] == 4 * memory_four["weights, float32, frozen"] == 4 * sizes.parameters
    assert memory_one["mask logits and adam8bit"] == 6 * sizes.prunable
    assert memory_one["gradient held to the end of a step"] == 4 * sizes.prunable
    assert memory_four["gradient held to the end of a step"] == 0  # four micro-batches in all
    clipped = recipe.load(str(tiny / "tiny.yaml"), ["learn.leap.workers=4"]).learn["leap"]
    held = worker_memory(clipped, dtype, length, sizes)["gradient held to the end of a step"]
    assert held == sizes.prunable
    assert memory_one["largest layer, gathered"] == memory_four["largest layer, gathered"]
    seconds = [learn_seconds(learn, length, sizes, 1e6) - WORKER_START for learn in (one, four)]
    assert seconds[0] == pytest.approx(4 * seconds[1])
    # A token: 2·N forward, 2·N backward, 2·N for the teacher, and the gradient of the masked weights.
    least = (6 * sizes.linear + 2 * sizes.prunable) * training_tokens(one, length) / 1e6
    assert least < seconds[0] < 1.2 * least
    priors = plan_of(tiny, ["prior.methods=[wanda, admm]"]).of(Prior)
    wanda, admm = (prior.cost(sizes, MACHINE).seconds or 0 for prior in priors)
    assert admm > wanda > 0


def test_the_full_set_of_a_task_has_no_estimate(tiny: Path, base: list[str]) -> None:
    plan = plan_of(tiny, base)
    sizes = measure(plan.config)
    seconds = {cell.subject: cell.cost(sizes, MACHINE).seconds for cell in plan.of(Cell)}
    assert seconds["one"] is None
    assert seconds["two"]
    assert seconds["words"]
    assert seconds["cloze"]


def test_the_corpora_of_a_plan_stay_apart(tiny: Path, base: list[str]) -> None:
    plan = plan_of(tiny, base)
    assert {text.role: [other.role for other in text.apart] for text in plan.of(Calibrate)} == {
        "words": [],
        "heldout": ["words"],
        "calibration": ["words", "heldout"],
    }


def test_a_nested_entry_is_one_learning_run_for_all_sparsities(tiny: Path, base: list[str]) -> None:
    several = [*base, "sparsities=[0.7, 0.5, 0.6]"]
    plan = plan_of(tiny, [*several, "learn.leap.nested=true", "reconstruct=[leap]"])
    (learn,) = plan.of(Learn)
    assert (learn.name, learn.sparsities) == ("learn/leap", (0.7, 0.5, 0.6))
    assert learn.prior == plan.priors["wanda", "row", 0.7], "the highest"
    sources = {v.name: v.export.source for v in plan.variants if v.export}
    assert all(sources[f"leap@{s:g}"] == learn for s in (0.5, 0.6, 0.7))
    assert {fitted.sparsity: fitted for fitted in plan.of(Reconstruct)} == {
        s: sources[f"leap+weights@{s:g}"] for s in (0.5, 0.6, 0.7)
    }
    assert all(v.learned == learn for v in plan.variants if v.method.startswith("leap"))
    keys = keys_of(plan)  # names are told apart
    apart = keys_of(plan_of(tiny, several))
    assert len([name for name in apart if name.startswith("learn/")]) == 3
    fewer = keys_of(plan_of(tiny, [*base, "sparsities=[0.5, 0.6]", "learn.leap.nested=true"]))
    assert fewer["learn/leap"] != keys["learn/leap"]
    alone = [*base, "learn.leap.nested=true"]
    assert [learn.sparsities for learn in plan_of(tiny, alone).of(Learn)] == [(0.5,)]
    shared = r"learn\.leap: nested wants masks whose sparsity is shared over the model, and it is by row"
    with pytest.raises(UserError, match=shared):
        plan_of(tiny, [*alone, "learn.leap.settings.family.scope=row"])


def test_seeds_reconstruction_and_speed_go_together(tiny: Path) -> None:
    """Speed is that of a learned mask, once a sparsity and scope: of the first seed and entry, not of new weights."""
    other = [
        "learn.other={like: leap, settings: {steps: 3}}",
        "learn.rows={like: leap, settings: {family: {scope: row}}}",
    ]
    plan = plan_of(
        tiny, ["benchmark={}", "learn.leap.seeds=[3, 4]", "reconstruct=[leap]", *other, "sparsities=[0.5, 0.6]"]
    )
    assert [speed.item for speed in plan.of(Benchmark)] == [
        "leap.seed3@0.5",
        "rows.seed3@0.5",
        "leap.seed3@0.6",
        "rows.seed3@0.6",
    ]


def test_a_mask_over_new_weights_is_exported_with_its_priors(tiny: Path, base: list[str]) -> None:
    over = ["learn.leap.settings.prior=admm", "learn.leap.settings.weights=prior"]
    (learn,) = plan_of(tiny, [*base, *over]).of(Learn)
    assert (learn.prior.method, learn.prior.compared) == ("admm", "row")
    assert learn.config.settings.weights == "prior"
    with pytest.raises(UserError, match="learned over weights that its prior has fitted"):
        plan_of(tiny, [*base, *over, "reconstruct=[leap]"])
    with pytest.raises(UserError, match="weights prior wants a prior"):
        plan_of(tiny, [*base, "learn.leap.settings.weights=prior"])
