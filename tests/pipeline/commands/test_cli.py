"""The command line: what it offers, what it prints, and that wrong input ends in one line before anything starts."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import sentences
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import pipeline.commands.prune
from pipeline.config import CorpusConfig, recipe
from pipeline.data import hub, local_files
from pipeline.evaluation import tasks
from pipeline.execution import preflight
from pipeline.model import loading
from pipeline.run import main, parse, parser
from pipeline.stages.evaluate import Cell

#: The public command line: options (with the number of values) and positionals of each command.
COMMANDS = {
    "run": {"--recipe": 1, "--quiet": 0, "--json": 0, "overrides": "*"},
    "plan": {"--recipe": 1, "overrides": "*"},
    "compare": {"filter": "?", "--experiment": 1, "--runs": 1, "--uri": 1},
    "sync": {"--runs": 1, "--uri": 1},
    "tune": {
        "--recipe": 1,
        "--space": 1,
        "--trials": 1,
        "--search": 1,
        "--against": 1,
        "--full": 0,
        "--confirm": 0,
        "--quiet": 0,
        "--json": 0,
        "overrides": "*",
    },
    "recipes": {},
    "fields": {},
}


def test_the_command_line_is_what_it_was() -> None:
    (commands,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found = {
        name: {
            (action.option_strings or [action.dest])[-1]: 1 if action.nargs is None else action.nargs
            for action in command._actions
            if action.dest != "help"
        }
        for name, command in commands.choices.items()
    }
    assert found == COMMANDS
    assert parse(["run", "a=1", "--recipe", "nano", "b=2", "--quiet", "c=3"]).overrides == ["a=1", "b=2", "c=3"]
    assert parse(["run", "--recipe", "nano"]).overrides == []
    for wrong in (["run"], ["plan"], [], ["run", "--recipe", "nano", "--quite"], ["recipes", "a=1"]):
        with pytest.raises(SystemExit) as caught:
            parse(wrong)
        assert caught.value.code == 2


@pytest.fixture
def fails(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> SimpleNamespace:
    """Runs a recipe that must not get as far as Ray; ``of`` returns the one line on standard error."""

    def started(*_: object) -> None:
        raise AssertionError("Ray would have been started")

    monkeypatch.setattr(pipeline.commands.prune, "start_ray", started)

    def of(*overrides: str, name: str = str(tiny / "tiny.yaml")) -> str:
        assert main(["run", "--recipe", name, f"output={tmp_path / 'runs'}", *overrides]) == 2
        out, err = capsys.readouterr()
        assert not ray.is_initialized()
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert out == ""
        assert not (tmp_path / "runs").exists()
        return err.removeprefix("error: ").rstrip()

    recipe_file = str(tiny / "tiny.yaml")
    return SimpleNamespace(of=of, directory=tmp_path, model=tiny / "model", recipe=recipe_file, capsys=capsys)


@pytest.mark.parametrize(
    ("override", "key", "parts"),
    [
        ("stages=1", "stages", ["unknown key", "allowed here", "sparsities"]),
        ("learn.leap.settings.learning_rat=1", "learn.leap.settings.learning_rat", ["did you mean learning_rate?"]),
        ("learn.leap.settings.density.wight=1", "learn.leap.settings.density.wight", ["did you mean weight?"]),
        ("data.evaluation.words.token=1", "data.evaluation.words.token", ["did you mean tokens?"]),
        ("evaluate.cloze.question=1", "evaluate.cloze.question", ["did you mean questions?"]),
        ("sparsities=[1.0]", "sparsities.0", ["less than 1", "not 1.0"]),
        ("sparsities=[0.5, -0.1]", "sparsities.1", ["greater than or equal to 0", "not -0.1"]),
        ("sparsities=[0.5, 0.5]", "sparsities", ["first six digits", "[0.5, 0.5]"]),
        ("sparsities=[0.5, 0.5000001]", "sparsities", ["first six digits", "0.5000001"]),
        ("name=../../x", "name", ["one folder", "'../../x'"]),
        ("name=''", "name", ["one folder", "''"]),
        ("name=.", "name", ["one folder", "'.'"]),
        ("name=a/b", "name", ["one folder", "'a/b'"]),
        ('name="a\\0b"', "name", ["NUL", "x00"]),
        ("tracking.uri=foo://x", "tracking.uri", ["foo://x", "MLflow has no store foo://", "sqlite"]),
        (f"name={'n' * 101}", "name", ["at most 100 bytes", "not 101"]),
        ("output=''", "output", ["a directory or a URI", "''"]),
        ('output="a\\0b"', "output", ["NUL", "x00"]),
        ('model.source="a\\0b"', "model.source", ["NUL", "x00"]),
        ('data.calibration.source=["a.txt", "b\\0.txt"]', "data.calibration.source", ["NUL", "x00"]),
        ('evaluate.task_directory="a\\0b"', "evaluate.task_directory", ["NUL", "x00"]),
        (f"output=/tmp/{'n' * 256}/x", "output", ["at most 255 bytes", "between slashes", "not 256"]),
        (f"output={'/tmp' * 1001}", "output", ["at most 4000 bytes", "not 4004"]),
        (f"model.source={'n' * 300}", "model.source", ["at most 255 bytes"]),
        (f"evaluate.tasks=[{'n' * 300}]", "evaluate.tasks", ["at most 255 bytes"]),
        (f"learn.{'n' * 101}.workers=1", "learn", ["at most 100 bytes", "not 101"]),
        (f"data.evaluation.{'n' * 101}.tokens=9", "data.evaluation", ["at most 100 bytes", "not 101"]),
        (f"seed={2**64}", "seed", ["less than", str(2**64)]),
        (f"learn.leap.seeds=[0, {2**64}]", "learn.leap.seeds.1", ["less than", str(2**64)]),
        (f"learn.leap.settings.seed={2**64}", "learn.leap.settings", ["seed must lie in", str(2**64)]),
        ("learn.leap.like=[leap]", "learn.leap.like", ["name of another entry", "['leap']"]),
        (f"sparsities={'[' * 2000}{']' * 2000}", "sparsities", ["YAML"]),
        ("model.source=a b/c", "model.source", ["neither nano, a directory", "a b/c"]),
        ("data.calibration.source=hub:a b", "data.calibration.source", ["hub:a b", "hub:DATASET"]),
        ("sparsities=half", "sparsities", ["valid list", "'half'"]),
        ("learn.leap.settings.batch_rows=5", "learn.leap", ["5 micro-batches", "2 workers", "batch_rows"]),
        ("learn.leap.workers=3", "learn.leap", ["4 micro-batches", "3 workers", "workers"]),
        ("learn.leap.settings.microbatch_rows=3", "learn.leap.settings", ["batch_rows 4", "multiple"]),
        ("learn.leap.settings.noise=true", "learn.leap.settings.noise", ["is now learn.leap.settings.family.noise"]),
        ("learn.leap.settings.family.kind=x", "learn.leap", ["must be one of leap, maskllm", "'x'"]),
        ("learn.leap.settings.family.strengh=1", "learn.leap.settings.family.strengh", ["did you mean strength?"]),
        (
            "learn.leap.settings.family.temperature.start=0",
            "learn.leap.settings.family.temperature",
            ["positive", "0.0"],
        ),
        ("learn.leap.settings.family.scale.end=-1", "learn.leap.settings.family.scale", ["positive", "-1.0"]),
        ("learn.leap.settings.family.scale.end=.inf", "learn.leap.settings.family.scale", ["finite", "inf"]),
        (
            "learn.leap.settings.family.scale.shape=step",
            "learn.leap.settings.family.scale.shape",
            ["'linear'", "'cosine'", "'step'"],
        ),
        ("learn.leap.settings.family.scale=3", "learn.leap.settings.family.scale", ["dictionary", "3"]),
        ("learn.leap.settings.learning_rate=.nan", "learn.leap.settings", ["learning_rate", "positive", "nan"]),
        ("evaluate.batch_size=many", "evaluate.batch_size", ["integer", "'auto'", "'many'"]),
        ("prior.methods=[wandb]", "prior.methods.0", ["wanda", "admm", "'wandb'"]),
        ("prior.pattern=2:4", "prior.pattern", ["tuple", "124"]),
        ("prior.pattern=[0, 4]", "prior.pattern.0", ["greater than 0", "0"]),
        ("prior.pattern=[3, 4]", "prior.pattern", ["3:4", "0.25", "[0.5]"]),
        ("prior.pattern=[4, 8]", "prior.pattern", ["groups of 8", "36, 50"]),
        ("prior.options={wanda: {schedule: cubic}}", "prior.options.wanda", ["no option 'schedule'"]),
        ("prior.options={admm: {schedule: steep}}", "prior.options.admm", ["schedule", "cubic", "'steep'"]),
        ("prior.options={admm: {iterations: many}}", "prior.options.admm", ["'<='", "'str'"]),
        ("data.calibration.source=5", "data.calibration.source", ["string", "list", "5"]),
        ("sparsities", "sparsities", ["expected key.sub=value"]),
        ("=0.5", "=0.5", ["expected key.sub=value"]),
        ("sparsities=[0.5", "sparsities", ["'[0.5'", "YAML"]),
        ("sparsities.x=1", "sparsities.x", ["sparsities is a value, not a section"]),
        ("seed.x=1", "seed", ["valid integer"]),
        ("model.source=./nowhere", "model.source", ["./nowhere", "a directory, a .gguf file, gguf:PACKAGE"]),
        ("model.source=gguf:no-such-package", "model.source", ["no installed package no-such-package", "pip install"]),
        ("data.calibration.source=/no/such.jsonl", "data.calibration.source", ["no file matches", "embedded"]),
        ("data.heldout.source=$NOT_SET/a.txt", "data.heldout.source", ["no file matches", "variable is not set"]),
        ("data.evaluation.words.source=/no/*.txt", "data.evaluation.words.source", ["no file matches /no/*.txt"]),
        ("data.context_length=65", "data.context_length", ["65 tokens", "context of 64"]),
        ("evaluate.task_directory=/no/such", "evaluate.task_directory", ["does not exist"]),
        ("output=/dev/null", "output", ["is a file"]),
        ("output=nosuch://bucket", "output", ["nosuch"]),
        ("output=/tmp/what?", "output", ["/tmp/what?", "without ? and %"]),
        ("output=/tmp/50%25", "output", ["/tmp/50%25", "without ? and %"]),
    ],
)
def test_a_wrong_value_ends_in_one_line(fails: SimpleNamespace, override: str, key: str, parts: list[str]) -> None:
    tasks = ["evaluate.tasks=[one]"] if "task_directory" in override else []
    line = fails.of(*tasks, override)
    assert line.startswith((f"{key}:", f"{key} ")), line
    for part in parts:
        assert part in line


def test_an_unknown_recipe_comes_with_a_suggestion(fails: SimpleNamespace) -> None:
    line = fails.of(name="nanno")
    assert line.startswith("--recipe nanno: no such recipe; did you mean nano?")
    for name in recipe.names():
        assert name in line
    assert "did you mean" not in fails.of(name="nope")
    for long in ("n" * 300, f"{'n' * 300}.yaml"):  # no file system would look for it
        assert f"--recipe {long}: no such recipe" in fails.of(name=long)


def test_files_of_a_type_that_is_not_read(fails: SimpleNamespace) -> None:
    for name in ("a.docx", "b.txt", "c.jsonl"):
        (fails.directory / name).write_text("text")
    line = fails.of(f"data.calibration.source={fails.directory}/a.docx")
    assert line.startswith("data.calibration.source: cannot read")
    assert ".parquet" in line
    line = fails.of(f"data.calibration.source=[{fails.directory}/b.txt, {fails.directory}/c.jsonl]")
    assert "not jsonl, txt together" in line


def test_a_field_that_the_first_record_does_not_have(fails: SimpleNamespace) -> None:
    files = fails.directory
    (files / "a.jsonl").write_text('{"body": "text", "id": 1}\n')
    line = fails.of(f"data.heldout.source={files}/a.jsonl")
    assert line == "data.heldout.text_field: no field text; the records of a.jsonl have body, id"
    pq.write_table(pa.table({"title": ["x"]}), files / "b.parquet")
    line = fails.of(f"data.calibration.source={files}/b.parquet", "data.calibration.text_field=body")
    assert line == "data.calibration.text_field: no field body; the records of b.parquet have title"


def test_files_that_are_not_what_their_name_says(fails: SimpleNamespace) -> None:
    (fails.directory / "a.jsonl").write_text("text\n")
    (fails.directory / "b.jsonl").write_text("\n")
    (fails.directory / "c.parquet").write_text("text")
    said = [fails.of(f"data.heldout.source={fails.directory}/{name}") for name in ("a.jsonl", "b.jsonl", "c.parquet")]
    assert said[0] == "data.heldout.source: a.jsonl: line 1 is not a JSON record; each line has to be one"
    assert said[1] == "data.heldout.source: b.jsonl: nothing but empty files"
    assert said[2].startswith("data.heldout.source: c.parquet is not a parquet file")


def test_text_as_people_have_it(fails: SimpleNamespace) -> None:
    """What is refused names file and line, in ``plan`` and ``run`` alike."""
    files = fails.directory

    def of(name: str, *lines: bytes) -> str:
        (files / name).write_bytes(b"\n".join(lines) + b"\n")
        values = f"{{source: {files}/{name}, share: [0, 100], tokens: 1000000}}"
        line = fails.of(f"data.heldout={values}")
        assert main(["plan", "--recipe", fails.recipe, f"output={files}/runs", f"data.heldout={values}"]) == 2
        assert fails.capsys.readouterr().err == f"error: {line}\n"
        return line.removeprefix("data.heldout.")

    good = b'{"text": "the mask keeps a weight"}'
    said = of("latin1.jsonl", good, '{"text": "café"}'.encode("latin-1"))
    assert said == "source: latin1.jsonl: line 2 is not UTF-8; convert the file to it"
    said = of("list.jsonl", good, b'{"text": ["a"]}')
    assert said == "text_field: line 2 of list.jsonl: text holds a list, not text"
    assert of("no.jsonl.gz", good).startswith("source: no.jsonl.gz cannot be read after line 0")
    (files / "a.jsonl").write_bytes(good)
    (files / "b.jsonl").write_text('{"content": "a"}\n')
    line = fails.of(f"data.heldout.source={files}/[ab].jsonl")
    assert line == "data.heldout.text_field: no field text; the records of b.jsonl have content"
    (files / "folder.jsonl").mkdir()
    line = fails.of(f"data.heldout.source={files}/folder.jsonl")
    assert line.startswith(f"data.heldout.source: {files}/folder.jsonl is a folder; give its files")


@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_corpus_of_less_than_a_batch_says_how_much_it_has(fails: SimpleNamespace, form: str) -> None:
    texts = [sentences(seed, 1) for seed in range(3)]
    file = fails.directory / f"small.{form}"
    match form:
        case "txt":
            file.write_text("\n\n".join(texts))
        case "parquet":
            pq.write_table(pa.table({"text": texts}), file)
        case _:
            opener = gzip.open if form.endswith("gz") else open
            with opener(file, "wt") as lines:
                lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = loading.load_tokenizer(loading.ModelConfig(source=str(fails.model)))
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    given = [f"data.calibration.source={file}", "data.calibration.tokens=100000"]
    line = fails.of(*given, "data.calibration.share=[0,100]")
    assert line == (
        f"data.calibration.tokens: small.{form} has {tokens} tokens in 3 documents; 4 rows of 32 tokens are needed at "
        f"least, and it fills {tokens // 32}"
    )
    assert "in 0 documents in its share [0, 1]; 4 rows" in fails.of(*given, "data.calibration.share=[0,1]")


def test_a_plan_says_that_there_is_less_text_than_requested(
    fails: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token too few, by rows: what is asked for is rounded up to whole rows."""
    corpus = CorpusConfig(source=str(fails.model.parent / "text.jsonl"), share=(0, 60))
    tokenizer = loading.load_tokenizer(loading.ModelConfig(source=str(fails.model)))
    found = local_files.count([corpus.source], corpus, tokenizer, 10**9)
    command = ["plan", "--recipe", fails.recipe, f"output={fails.directory}/runs", "data.heldout.share=[60, 61]"]
    for tokens, few in ((found.tokens // 32 * 32, False), (found.tokens // 32 * 32 + 1, True)):
        assert main([*command, f"data.calibration.tokens={tokens}"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        expected = f"data.calibration.tokens: text.jsonl has {found.tokens} tokens in {found.documents} documents"
        rows = found.tokens // 32
        expected += f" in its share [0, 60], fewer than the {tokens} requested; its {rows} rows of 32 are all there is"
        assert (expected in said) == few, said


def test_a_tokenizer_with_more_tokens_than_the_model(fails: SimpleNamespace) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    line = fails.of(f"model.source={model}")
    assert line == "model.source: the tokenizer has 400 tokens and the model 300; they do not fit"


def test_a_special_token_beyond_the_model_is_none_that_a_text_has(fails: SimpleNamespace) -> None:
    tokenizer = loading.load_tokenizer(loading.ModelConfig(source=str(fails.model)))
    assert preflight._tokens_of_text(tokenizer) == 400
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert preflight._tokens_of_text(tokenizer) == 400  # as Gemma 3, whose tokenizer has one token more than the model
    tokenizer.add_tokens(["word"])
    assert preflight._tokens_of_text(tokenizer) == 402


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token"])
def test_a_special_token_beyond_the_model_that_rows_need(fails: SimpleNamespace, name: str) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    tokenizer = loading.load_tokenizer(loading.ModelConfig(source=str(model)))
    tokenizer.add_special_tokens({name: "<|im_end|>"})
    tokenizer.save_pretrained(model)
    line = fails.of(f"model.source={model}")
    said = f"the tokenizer's {name} <|im_end|> is number 400, beyond the model's 400 embeddings; they do not fit"
    assert line == f"model.source: {said}"


def test_a_tokenizer_without_a_fast_form(fails: SimpleNamespace) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    ByT5Tokenizer(extra_ids=10).save_pretrained(model)
    assert fails.of(f"model.source={model}").startswith("model.source: ByT5Tokenizer has no fast form")


def test_a_directory_without_weights_or_configuration(fails: SimpleNamespace) -> None:
    model = fails.directory / "model"
    model.mkdir()
    assert fails.of(f"model.source={model}").startswith(f"model.source: {model} has no config.json")
    shutil.copy(fails.model / "config.json", model)
    assert "safetensors" in fails.of(f"model.source={model}")


def test_a_model_without_linear_layers_to_prune(fails: SimpleNamespace) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    gpt = {"model_type": "gpt2", "n_embd": 12, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 400}
    (model / "config.json").write_text(json.dumps(gpt))
    line = fails.of(f"model.source={model}")
    assert line.startswith(f"model.source: {model}: GPT2LMHeadModel has no stack of decoder blocks")


def test_a_model_that_reads_a_weight_past_its_layer(fails: SimpleNamespace) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(model)
    fails.capsys.readouterr()  # a progress bar
    line = fails.of(f"model.source={model}")
    assert "no mask can be learned for backbone.layers.0.mixer.dt_proj and 1 more, which ran 0 times" in line


def _without(name: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors[name]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _with_nan(name: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[-1] = torch.nan
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _configured(**fields: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            _without("model.layers.0.self_attn.q_proj.weight"),
            "it lacks model.layers.0.self_attn.q_proj.weight",
        ),
        (_configured(num_hidden_layers=3), "it lacks model.layers.2.input_layernorm.weight"),
        (_configured(model_type="qwen2"), "it lacks model.layers.0.self_attn.k_proj.bias"),
        (_with_nan("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight holds NaN or Inf"),
        (lambda model: (model / "model.safetensors").write_bytes(b"version https://git-lfs"), "git-LFS pointer"),
        (lambda model: (model / "adapter_config.json").write_text("{}"), "merge the adapter first"),
        (_configured(quantization_config={"quant_method": "gptq", "bits": 4}), "its weights are quantised (gptq)"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_ends_plan_and_run(
    fails: SimpleNamespace, tiny: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], said: str
) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    spoil(model)
    line = fails.of(f"model.source={model}")
    assert line.startswith("model.source: ")
    assert said in line
    assert main(["plan", "--recipe", str(tiny / "tiny.yaml"), f"model.source={model}"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_model_of_which_much_stays_dense(
    fails: SimpleNamespace, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fails.directory / "model"
    shutil.copytree(fails.model, model)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 400, "max_position_embeddings": 64}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts)).save_pretrained(model)
    capsys.readouterr()  # a progress bar
    line = fails.of(f"model.source={model}")
    said = "14.2 % of the decoder blocks' weights"
    assert line.startswith(f"model.source: of {model} only {said} lie in nn.Linear layers")
    assert line.endswith("model.allow_dense=true prunes what can be")
    plan = ["plan", "--recipe", str(tiny / "tiny.yaml"), f"model.source={model}"]
    assert main(plan) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert main([*plan, "model.allow_dense=true"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_hub_that_does_not_answer(fails: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answers", lambda: False)
    assert fails.of("model.source=no-such/model").startswith("model.source: cannot load no-such/model: ")


def test_an_unknown_task(fails: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    (fails.directory / "one.yaml").write_text("task: one\n")
    line = fails.of(f"evaluate.task_directory={fails.directory}", "evaluate.tasks=[onne]")
    assert line.startswith("evaluate.tasks: onne: no task 'onne'")
    assert "one" in line
    # lm-eval's own list takes long to read.
    monkeypatch.setattr(tasks, "_registry", lambda: SimpleNamespace(all_tasks=["piqa", "mmlu"]))
    line = fails.of("evaluate.tasks=[piqua]")
    assert line.startswith("evaluate.tasks: piqua: no task 'piqua' is registered with lm-eval")
    assert "piqa" in line


def test_too_little_disk(fails: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = fails.of()
    assert line.startswith("output: the artifacts need about")
    assert "has 0.0 GB free" in line


def test_more_workers_than_the_machine_can_place(fails: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.commands.prune, "resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    line = fails.of("learn.leap.workers=4")
    assert line == "learn.leap.workers: 4 workers of 1 threads need 4 CPUs, the cluster has 2"
    line = fails.of("learn.leap.gpu=true")
    assert line == "learn.leap.workers: 2 workers with a GPU each, the cluster has 0 GPUs"


def test_a_search_refuses_the_same_before_anything_starts(
    fails: SimpleNamespace, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["tune", "--recipe", str(tiny / "tiny.yaml"), f"output={fails.directory / 'runs'}", "--space"]
    for more, said in (
        (["schedule"], "error: --space schedule: no such space; did you mean schedules?"),
        (["schedules", "sparsities=[1.5]"], "error: sparsities.0:"),
        (["schedules", "data.context_length=65"], "error: data.context_length: 65 tokens"),
        (["n" * 300], f"error: --space {'n' * 300}: no such space"),
        (["schedules", "--trials", "0"], "error: --trials: must be 1 or more, not 0"),
        (["schedules", "--trials=-3"], "error: --trials: must be 1 or more, not -3"),
        (["schedules", "--against", "sparsity"], "error: --against sparsity: needs two or more sparsities"),
    ):
        assert main([*search, *more]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(said), err
        assert (out, err.count("\n")) == ("", 1)
    assert not (fails.directory / "runs").exists()


def test_a_plan_shows_work_sizes_and_what_is_finished(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--recipe", str(tiny / "tiny.yaml"), f"output={tmp_path}"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines() if not line.startswith("results in")) <= 80
    for text in (
        "calibrate",
        "wanda@0.5",
        "leap@0.5",
        "3 to do",
        "4 to do",
        "largest layer, gathered",
        "estimates",
        "15.4\u00a0k",
    ):
        assert text in out
    assert "finished" not in out
    assert not list(tmp_path.iterdir())

    plan = pipeline.commands.prune.make_plan(recipe.load(arguments[2], arguments[3:]))
    with plan.priors["wanda", "row", 0.5].directory.work():
        pass
    with plan.of(Cell)[0].directory.work():
        pass
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("finished") == 1
    assert "1 of 3 done" in out


def test_a_plan_of_a_model_that_cannot_be_reached_leaves_out_sizes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "--recipe", "llama-3.2-1b", f"output={tmp_path}", "model.source=no-such/model"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = [line for line in out.splitlines() if line.startswith("model.source:")]
    assert "no-such/model cannot be read" in line
    for text in ("leap@0.6", "32.8\u00a0M", "4 GPU"):
        assert text in out


def test_a_plan_that_cannot_be_run_says_why(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--recipe", str(tiny / "tiny.yaml"), f"output={tmp_path}"]
    assert main([*plan, "data.context_length=128"]) == 2
    out, err = capsys.readouterr()
    assert "leap@0.5" in out
    assert err == "error: data.context_length: 128 tokens are longer than the model's context of 64\n"
