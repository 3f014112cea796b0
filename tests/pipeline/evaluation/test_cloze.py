"""The cloze task, and lm-eval on it from end to end."""

import json
import math
import random
from collections import Counter

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.evaluation.cloze import write_cloze_task
from pipeline.evaluation.language_model import BoundedHFLM
from pipeline.evaluation.zero_shot import choose_documents, zero_shot

EOS = "<eos>"
SIZES = {"questions": 40, "context_tokens": 12, "continuation_tokens": 4, "seed": 3}
RUN = {"limit": None, "batch_size": "auto", "device": "cpu", "max_length": 32, "seed": 0}


def corpus(documents: int = 30, words: int = 60) -> list[str]:
    rng = random.Random(0)
    lexicon = ["".join(rng.choices("abcdefgo", k=rng.randint(1, 7))) for _ in range(200)]
    gaps = [" "] * 12 + ["\n", ", ", "  "]
    return ["".join(rng.choice(lexicon) + rng.choice(gaps) for _ in range(words)) for _ in range(documents)]


def train_tokenizer(texts: list[str], style: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if style == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


class Oracle(LlamaForCausalLM):
    """Expects, after any beginning of one of ``truths`` (lists of token ids), its next token."""

    truths: list[list[int]]
    largest_batch = 10**9

    def forward(self, input_ids, attention_mask, past_key_values=None, logits_to_keep=0, **_):
        if len(input_ids) > self.largest_batch:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        seen = past_key_values.rows if past_key_values else torch.zeros(len(input_ids), 0, dtype=torch.long)
        whole = torch.cat([seen, input_ids], dim=1)
        logits = torch.zeros(*whole.shape, self.config.vocab_size)
        for row, ids, kept in zip(logits, whole.tolist(), attention_mask.bool().tolist(), strict=True):
            padding = kept.index(True)
            for truth in self.truths:
                for position in range(min(len(ids) - padding, len(truth) - 1)):
                    if ids[padding + position] != truth[position]:
                        break
                    row[padding + position, truth[position + 1]] = 9.0
        logits = logits[:, seen.shape[1] :]
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=Rows(whole))


class Rows:
    """In place of keys and values, the tokens."""

    def __init__(self, rows):
        self.rows = rows

    def batch_select_indices(self, indices):
        self.rows = self.rows[indices]


def tiny(tokenizer, cls=LlamaForCausalLM):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return cls(config)


@pytest.fixture(scope="module")
def texts():
    return corpus()


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, "byte-level")


@pytest.fixture(scope="module")
def task(texts, tokenizer, tmp_path_factory):
    return write_cloze_task(texts, tokenizer, tmp_path_factory.mktemp("cloze"), **SIZES)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def read(path):
    return [json.loads(line) for line in path.with_name("cloze.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("style", ["byte-level", "metaspace"])
def test_questions(style, texts, tmp_path):
    tokenizer = train_tokenizer(texts, style)
    lines = read(write_cloze_task(texts, tokenizer, tmp_path, **SIZES))
    assert len(lines) == 40
    assert Counter(line["gold"] for line in lines) == {0: 10, 1: 10, 2: 10, 3: 10}
    assert len({line["query"] for line in lines}) == 40
    for line in lines:
        choices, gold = line["choices"], line["gold"]
        assert len(set(choices)) == 4
        own = texts[line["documents"][gold]]
        assert f"{line['query']} {choices[gold]}" in own
        for index, choice in enumerate(choices):
            assert choice in texts[line["documents"][index]]
            assert (choice in own) == (index == gold)
            context = tokenizer.encode(line["query"])
            whole = tokenizer.encode(f"{line['query']} {choice}")
            assert 12 - 4 < len(context) <= 12
            assert whole[: len(context)] == context
            assert len(whole) == len(context) + 4


def test_the_files_depend_on_the_seed_only(texts, tokenizer, task, tmp_path):
    def files(path):
        return [path.with_name(name).read_bytes() for name in ("cloze.jsonl", "cloze.yaml")]

    assert files(write_cloze_task(texts, tokenizer, tmp_path, **SIZES)) == files(task)
    assert files(write_cloze_task(texts, tokenizer, tmp_path, **SIZES | {"seed": 4})) != files(task)


def test_questions_spread_over_documents(texts, tokenizer, tmp_path):
    lines = read(write_cloze_task(texts, tokenizer, tmp_path, **SIZES | {"questions": 30}))
    assert len({line["documents"][line["gold"]] for line in lines}) == 30


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (slice(6), r"only \d+ of the 5000 cloze questions asked for, of 12 \+ 4 tokens each \(6 of 6 documents"),
        (slice(1), r"only 0 of the 5000 .* \(1 of 1 documents are long enough"),
        (slice(0), r"only 0 of the 5000 .* \(0 of 0 documents are long enough"),
    ],
)
def test_a_small_corpus_says_how_many(texts, tokenizer, tmp_path, keep, message):
    with pytest.raises(ValueError, match=message):
        write_cloze_task(texts[keep], tokenizer, tmp_path, **SIZES | {"questions": 5000})
    assert not list(tmp_path.iterdir())


def test_text_without_spaces_gives_no_questions(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="only 0 of the 40"):
        write_cloze_task(["abcdefg" * 40] * 9, tokenizer, tmp_path, **SIZES)


def test_a_model_that_knows_the_truth_scores_one(tokenizer, task):
    model = tiny(tokenizer, Oracle)
    model.truths = [tokenizer.encode(f"{line['query']} {line['choices'][line['gold']]}") for line in read(task)]
    result = zero_shot(model, tokenizer, task, **RUN)
    assert result["metrics"] == {"acc": 1.0, "acc_stderr": 0.0}
    assert result["task"] == "cloze"
    assert result["documents"] == 40
    assert result["truncated"] == 0
    assert [document["doc"] for document in result["per_document"]] == list(range(40))

    # A model that takes two rows at most gives the same after halving the batch.
    model.largest_batch = 2
    assert zero_shot(model, tokenizer, task, **RUN | {"batch_size": 16}) == result
    model.largest_batch = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        zero_shot(model, tokenizer, task, **RUN)


def test_scores_equal_a_direct_computation(tokenizer, task, capfd):
    model = tiny(tokenizer).eval()
    result = zero_shot(model, tokenizer, str(task.parent), **RUN | {"limit": 15})
    # Before anything else prints: lm-eval shall be silent.
    assert capfd.readouterr() == ("", "")
    json.dumps(result, allow_nan=False)

    lines = read(task)
    expected = {}
    for document in choose_documents({"cloze": 40}, limit=15, seed=0, skip_first=0)["cloze"]:
        line = lines[document]
        scores = []
        for choice in line["choices"]:
            ids = torch.tensor(tokenizer.encode(f"{line['query']} {choice}"))
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[-5 + i, ids[-4 + i]].item() for i in range(4)))
        expected[document] = float(max(range(4), key=scores.__getitem__) == line["gold"])
    assert {d["doc"]: d["scores"]["acc"] for d in result["per_document"]} == expected
    accuracy = sum(expected.values()) / 15
    assert result["metrics"]["acc"] == pytest.approx(accuracy)
    assert result["metrics"]["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 14))


def test_a_model_directory_gives_the_same_as_the_loaded_model(tokenizer, task, tmp_path):
    model = tiny(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = RUN | {"limit": 10, "skip_first": 20}
    result = zero_shot(tmp_path, str(tmp_path), task, **run)
    assert result == zero_shot(model, tokenizer, task, **run)
    assert min(document["doc"] for document in result["per_document"]) >= 20


def test_documents_longer_than_the_context_are_cut_on_the_left(tokenizer, task):
    model = tiny(tokenizer)
    lines = read(task)
    lengths = [len(tokenizer.encode(f"{line['query']} {line['choices'][0]}")) for line in lines]
    result = zero_shot(model, tokenizer, task, **RUN | {"max_length": 13})
    # The last token is predicted, not fed.
    assert 0 < result["truncated"] == sum(length > 14 for length in lengths) < 40
    # Even the choices, of 4 tokens, are longer than this context.
    assert zero_shot(model, tokenizer, task, **RUN | {"max_length": 3})["truncated"] == 40
    with pytest.raises(ValueError, match="max_length 33 exceeds the model's 32 positions"):
        zero_shot(model, tokenizer, task, **RUN | {"max_length": 33})


def test_broken_logits_are_an_error(tokenizer, task):
    model = tiny(tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="a log-probability is NaN"):
        zero_shot(model, tokenizer, task, **RUN)


def test_automatic_batch_size_follows_the_token_budget(tokenizer):
    model = tiny(tokenizer)
    language_model = BoundedHFLM(model, tokenizer, batch_size="auto", max_length=32)
    assert language_model._batch_size(tokens=8) == 64
    model.config.vocab_size = 128_000  # 2^30 / (8 * 128000) = 1048 tokens
    assert language_model._batch_size(tokens=20) == 1048 // 20
    assert language_model._batch_size(tokens=1000) == 1048 // 32  # no longer than the context


def test_chosen_documents():
    sizes = {"a": 200, "b": 50}
    chosen = choose_documents(sizes, limit=20, seed=1, skip_first=0)
    assert chosen == choose_documents(sizes, limit=20, seed=1, skip_first=0)
    assert chosen != choose_documents(sizes, limit=20, seed=2, skip_first=0)
    assert {name: len(indices) for name, indices in chosen.items()} == {"a": 20, "b": 20}
    more = choose_documents(sizes, limit=60, seed=1, skip_first=0)
    assert set(chosen["a"]) < set(more["a"])
    assert more["b"] == list(range(50))
    # Skipped documents are spread over the subtasks, rounded up.
    rest = choose_documents(sizes, limit=None, seed=1, skip_first=25)
    assert rest == {"a": list(range(13, 200)), "b": list(range(13, 50))}
    with pytest.raises(ValueError, match="b has 50 documents, none is left after skipping the first 50"):
        choose_documents(sizes, limit=None, seed=1, skip_first=100)
