"""A multiple-choice cloze task made of a corpus that has no benchmark of its own.

A question is a stretch of a document; the four choices are what follows it, and three stretches of equally many tokens
that follow something else in other documents. All choices have the same number of tokens, so the plain accuracy is
already normalised by length and the task has no ``acc_norm``, which would divide by characters.

**Boundaries.** lm-eval tokenises ``query + " " + choice`` as one string and takes the tokens after those of ``query``
as the choice. Texts are therefore cut only at single spaces between two non-space characters, where byte-level and
SentencePiece tokenizers start a new token anyway, and every query with every choice is tokenised once here: one whose
tokens would not split at the boundary, or whose choice would not have exactly the asked number of tokens, is left out.
Text without spaces between words (Chinese, say) gives no questions.
"""

from __future__ import annotations

import json
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

CHOICES = 4
_BOUNDARY = re.compile(r"(?<=\S) (?=\S)")
_ANCHOR = "a"


@dataclass(frozen=True, slots=True)
class _Window:
    document: int
    context: str
    continuation: str


def write_cloze_task(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    questions: int,
    context_tokens: int,
    continuation_tokens: int,
    seed: int,
) -> Path:
    """Write ``cloze.jsonl`` and the lm-eval task file ``cloze.yaml`` that reads it into ``directory``.

    The same arguments give the same files. As many different documents as possible are asked about; within one, the
    questions do not overlap. The true continuation stands at each of the four positions equally often (± 1). Each line
    holds ``query``, ``choices``, ``gold`` and ``documents`` (index into ``texts`` of each choice).

    Args:
        texts: documents.
        context_tokens: length of a query, reached to within ``continuation_tokens`` and never exceeded.
        continuation_tokens: exact length of every choice. Neither count includes special tokens.

    Returns:
        Path of ``cloze.yaml``, which ``tasks.resolve_task`` takes; the folder may be moved as a whole.

    Raises:
        ValueError: the corpus is too small; the message says how many questions could be made.
    """
    rng = random.Random(seed)
    lengths = (context_tokens, continuation_tokens)
    windows = _read_windows(texts, tokenizer, lengths, documents=2 * questions + 2 * CHOICES, rng=rng)
    pool = [window for group in windows for window in group]
    rng.shuffle(pool)
    positions = [index % CHOICES for index in range(questions)]
    rng.shuffle(positions)

    lines: list[dict[str, object]] = []
    waiting = deque(windows)
    while waiting and len(lines) < questions:
        group = waiting.popleft()
        window = group.pop()
        start = rng.randrange(len(pool))
        distractors = _distractors(window, pool[start:] + pool[:start], texts[window.document], tokenizer, lengths)
        if distractors is not None:
            gold = positions[len(lines)]
            choices = [*distractors[:gold], window, *distractors[gold:]]
            lines.append(
                {
                    "query": window.context,
                    "choices": [choice.continuation for choice in choices],
                    "gold": gold,
                    "documents": [choice.document for choice in choices],
                }
            )
        if group and distractors is not None:
            waiting.append(group)  # a second question about this document comes after the others have had theirs
        elif group:
            waiting.appendleft(group)
    if len(lines) < questions:
        raise ValueError(
            f"the corpus gives only {len(lines)} of the {questions} cloze questions asked for, of {context_tokens} "
            f"+ {continuation_tokens} tokens each ({len(windows)} of {len(texts)} documents are long enough)"
        )

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "cloze.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    task = {
        "task": "cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "cloze.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {
            "version": 1.0,
            "context_tokens": context_tokens,
            "continuation_tokens": continuation_tokens,
            "seed": seed,
        },
    }
    path = directory / "cloze.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return path


def _read_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: tuple[int, int],
    *,
    documents: int,
    rng: random.Random,
) -> list[list[_Window]]:
    """The windows of each of up to ``documents`` long enough documents; documents and windows in random order."""
    # Tokens of a piece at the beginning of a text, and after a space. Words repeat, so few pieces are tokenised.
    counts: dict[str, tuple[int, int]] = {}
    anchor = len(tokenizer.encode(_ANCHOR, add_special_tokens=False))
    windows = []
    for document in rng.sample(range(len(texts)), len(texts)):
        pieces = _BOUNDARY.split(texts[document].strip())
        if new := sorted({piece for piece in pieces if piece not in counts}):
            first = tokenizer(new, add_special_tokens=False)["input_ids"]
            later = tokenizer([f"{_ANCHOR} {piece}" for piece in new], add_special_tokens=False)["input_ids"]
            counts.update((piece, (len(a), len(b) - anchor)) for piece, a, b in zip(new, first, later, strict=True))
        found = [
            _Window(document, " ".join(pieces[start:cut]), " ".join(pieces[cut:end]))
            for start, cut, end in _spans([counts[piece] for piece in pieces], *lengths)
        ]
        if found:
            rng.shuffle(found)
            windows.append(found)
        if len(windows) == documents:
            break
    return windows


def _spans(
    counts: list[tuple[int, int]], context_tokens: int, continuation_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """Disjoint (start, cut, end) in pieces, left to right: context [start, cut), continuation [cut, end).

    The context is the longest run of pieces of at most ``context_tokens`` tokens. The piece after it did not fit and is
    no longer than a continuation, so it has more than ``context_tokens - continuation_tokens``. A start whose
    continuation cannot have exactly the asked length is passed over.

    Args:
        counts: for each piece of a document its tokens at the beginning of a text, and after a space.
    """
    start = 0
    while True:
        cut, total = start, 0
        while cut < len(counts) and total + (size := counts[cut][1 if cut > start else 0]) <= context_tokens:
            total += size
            cut += 1
        end, total = cut, 0
        while end < len(counts) and total < continuation_tokens:
            total += counts[end][1]
            end += 1
        if total < continuation_tokens:
            return
        if total == continuation_tokens and cut > start:
            yield start, cut, end
            start = end
        else:
            start += 1


def _distractors(
    window: _Window,
    candidates: Sequence[_Window],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    lengths: tuple[int, int],
) -> list[_Window] | None:
    """The first candidates that can stand beside the truth; None if they are too few or the window does not split."""
    context = tokenizer.encode(window.context, add_special_tokens=False)

    def splits(continuation: str) -> bool:
        whole = tokenizer.encode(f"{window.context} {continuation}", add_special_tokens=False)
        return whole[: len(context)] == context and len(whole) - len(context) == lengths[1]

    if len(context) > lengths[0] or not splits(window.continuation):
        return None
    found: list[_Window] = []
    taken = {window.continuation}
    for candidate in candidates:
        # A continuation that stands in the document too (a copy of it, a set phrase) might be as right as the truth.
        if candidate.document == window.document or candidate.continuation in taken or candidate.continuation in text:
            continue
        if splits(candidate.continuation):
            found.append(candidate)
            taken.add(candidate.continuation)
            if len(found) == CHOICES - 1:
                return found
    return None
