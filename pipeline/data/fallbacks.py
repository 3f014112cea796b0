"""The embedded text where the files of a recipe do not exist: once, and under its own name."""

from __future__ import annotations

from pipeline.config import CorpusConfig, DataConfig, RunConfig
from pipeline.data import corpora
from pipeline.errors import UserError

NAME = "embedded"
"""Of the text in ``data.evaluation`` that stands in for others."""


def resolve(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """A recipe that names what is read, and a line for each text that the embedded one stands in for.

    Raises:
        UserError: the recipe has another text of the name that the embedded one gets.
    """
    data, defaults, notes = config.data, DataConfig(), []
    changes: dict[str, object] = {}
    for role in ("calibration", "heldout"):
        corpus: CorpusConfig = getattr(data, role)
        if _stood_in_for(corpus):
            notes.append(f"{_absence(role, corpus)}; the embedded text is read in its place")
            # Its share stays: a tenth of the embedded text is little to learn from.
            changes[role] = _embedded(corpus, corpus.share)
    texts: dict[str, CorpusConfig] = {}
    measured = [name for name, corpus in data.evaluation.items() if corpus.source == "embedded"]
    for name, corpus in data.evaluation.items():
        if not _stood_in_for(corpus):
            texts[name] = corpus
            continue
        place = measured[0] if measured else NAME
        notes.append(
            f"{_absence(f'evaluation.{name}', corpus)}; the table has {place}, the embedded text, in its place"
        )
        if place not in data.evaluation:
            texts.setdefault(place, _embedded(corpus, defaults.evaluation["docs"].share))
        elif not measured:
            raise UserError(f"data.evaluation.{NAME}: choose another name: this one is the embedded text's")
    changes["evaluation"] = texts
    return (config.model_copy(update={"data": data.model_copy(update=changes)}) if notes else config), notes


def _stood_in_for(corpus: CorpusConfig) -> bool:
    return corpus.fallback is not None and corpora.is_absent(corpus)


def _absence(key: str, corpus: CorpusConfig) -> str:
    return f"data.{key}.source: no file of {corpus.source} exists"


def _embedded(corpus: CorpusConfig, share: tuple[int, int]) -> CorpusConfig:
    return CorpusConfig(source="embedded", share=share, tokens=corpus.tokens)
