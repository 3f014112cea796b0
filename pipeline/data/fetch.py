"""Fetch the texts and tasks of the tables from the Hugging Face hub into a folder.

    python -m pipeline.data.fetch ~/leap-data       # or: make data DATA=~/leap-data
    export LEAP_DATA=~/leap-data

``SOURCES.json`` in the folder records where each file comes from and its hash. A second call checks the hashes and
fetches what is missing or damaged. WikiText-2 and the tasks are compared with the rows that the tables in
docs/results.md were made on. C4 and Wikipedia are other documents of the same corpora than the tables'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from pipeline.data import hub
from pipeline.errors import UserError
from pipeline.nano.corpus import bucket_of

Record = dict[str, Any]

#: Characters of each text: enough for the tokens that the recipes of SmolLM2 take, and a tenth more.
CHARACTERS = {"c4_train": 1_500_000, "c4_heldout": 200_000, "wikipedia_train": 1_500_000, "wikipedia_heldout": 200_000}
#: Shorter documents are stubs.
LEAST_CHARACTERS = 200
#: Wikipedia has one split: the documents from this percentile of their hash on are held out.
HELD_OUT_FROM = 90

#: Definition of each task within lm-eval, and the fields of a record that a table depends on.
TASKS = {
    "piqa": ("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "arc_easy": ("arc/arc_easy.yaml", ("question", "choices", "answerKey")),
    "arc_challenge": ("arc/arc_challenge.yaml", ("question", "choices", "answerKey")),
    "winogrande": ("winogrande/default.yaml", ("sentence", "option1", "option2", "answer")),
    "openbookqa": ("openbookqa/openbookqa.yaml", ("question_stem", "choices", "answerKey")),
}
MMLU = "mmlu/default/mmlu_*.yaml"
MMLU_FIELDS = ("question", "choices", "answer")
#: Hash, by :func:`hash_of_rows`, of the rows that the tables were made on; of MMLU over its subjects in order.
OF_THE_TABLES = {
    "wikitext2": "0c33d0dc0381a28c333023420c6f50e84693eea520d5bdc7392f689323551054",
    "piqa": "256cd78377a0090efcbc05662c15821c9b60f98a708bf48115d0d9af80c67313",
    "arc_easy": "b142620da6eec7e1105226cbad5e3f34cbd9ccc65e05ea9f138c0da9a117ef0d",
    "arc_challenge": "782446d5f137ad1f2ec35ed1e64990905691157f6f9ecd15260b26a4049021c3",
    "winogrande": "8e8671d6097f314f4ddc6c9734e382810926a1e0c3e76664715786d25b4a78d4",
    "openbookqa": "d558cc5b6cf7d453dfd6f82ac13fd9fc4c1285ded7956340fd5637669ced4795",
    "mmlu": "2e678bae1208e7c33ba28198aa89c5fdc4aca87cdffd8c95b334c4ed544885fe",
}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Source:
    """A split of a data set on the hub."""

    repo: str
    subset: str | None
    split: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.repo, self.subset, self.split)))

    def records(self) -> Iterator[Record]:
        """Its records in order, read as a stream.

        Raises:
            UserError: the hub does not give them.
        """
        from datasets import load_dataset

        try:
            commit = hub.commit("dataset", self.repo, None)
            stream = load_dataset(self.repo, self.subset, split=self.split, revision=commit, streaming=True)
            yield from stream
        except Exception as error:  # the hub client raises a dozen kinds
            raise UserError(f"cannot read {self} from the hub: {' '.join(str(error).split())[:300]}") from error


class Folder:
    """The user's folder: files, and where each came from.

    Args:
        path: of the folder, made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = path / "SOURCES.json"
        self.sources: dict[str, dict[str, Any]] = json.loads(self._index.read_text()) if self._index.is_file() else {}

    def write(self, name: str, source: Source, records: Iterable[Record]) -> bool:
        """Write ``records`` of ``source`` as lines of JSON, unless the file is there whole. Whether it was written.

        Raises:
            UserError: there are no records.
        """
        path = self.path / name
        known = self.sources.get(name)
        if known and path.is_file() and _sha256(path) == known["sha256"]:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        rows = 0
        with unfinished.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                rows += 1
        if not rows:
            raise UserError(f"{source} on the hub gave no documents for {name}")
        unfinished.replace(path)
        self.sources[name] = {
            "repository": source.repo,
            "subset": source.subset,
            "split": source.split,
            "commit": hub.commit("dataset", source.repo, None),
            "rows": rows,
            "sha256": _sha256(path),
        }
        self._index.write_text(json.dumps(self.sources, indent=1) + "\n")
        print(f"{name}: {rows:,} records of {source}")
        return True

    def read(self, name: str) -> Iterator[Record]:
        """The records of a file."""
        with (self.path / name).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def fetch(folder: Path) -> list[str]:
    """Fetch what ``folder`` lacks. Returns the names of what differs from the rows that the tables were made on.

    Raises:
        UserError: the hub cannot be reached, or does not give a data set.
    """
    if not hub.answers():
        raise UserError("the Hugging Face hub cannot be reached; check the network, or set HF_ENDPOINT to a mirror")
    into = Folder(folder)
    definitions = Path(lm_eval.tasks.__file__).parent
    hashes = {"wikitext2": _texts(into)}
    for name, (file, fields) in TASKS.items():
        evaluated = _task(into, f"{name}_local", f"eval/{name}/{{split}}.jsonl", definitions / file)
        hashes[name] = hash_of_rows(into.read(evaluated), fields)
    hashes["mmlu"] = _mmlu(into, sorted(definitions.glob(MMLU)))
    return [name for name, value in hashes.items() if value != OF_THE_TABLES[name]]


def hash_of_rows(records: Iterable[Record], fields: tuple[str, ...]) -> str:
    """SHA-256 over ``fields`` of records in order, whatever else they hold and however a file spells them."""
    digest = hashlib.sha256()
    for record in records:
        row = {field: record.get(field) for field in fields}
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _texts(into: Folder) -> str:
    """Fetch the texts; returns the hash of WikiText-2's pages."""
    pages = "text/wikitext2_test_pages.jsonl"
    wikitext = Source("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")
    into.write(pages, wikitext, wikitext.records())
    titles = {_title(record["page"]) for record in into.read(pages)}
    for name, split in (("c4_train", "train"), ("c4_heldout", "validation")):
        c4 = Source("allenai/c4", "en", split)
        into.write(f"text/{name}.jsonl", c4, _up_to(CHARACTERS[name], c4.records()))
    wikipedia = Source("wikimedia/wikipedia", "20231101.en", "train")
    for name, held_out in (("wikipedia_train", False), ("wikipedia_heldout", True)):
        chosen = (
            record
            for record in wikipedia.records()
            if (bucket_of(record["text"]) >= HELD_OUT_FROM) == held_out and _plain(record["title"]) not in titles
        )
        into.write(f"text/{name}.jsonl", wikipedia, _up_to(CHARACTERS[name], chosen))
    return hash_of_rows(into.read(pages), ("page",))


def _up_to(characters: int, records: Iterable[Record]) -> Iterator[Record]:
    """Text, and title where there is one, of the first documents with this many characters together."""
    taken = 0
    for record in records:
        if len(record["text"]) > LEAST_CHARACTERS:
            yield {field: record[field] for field in ("title", "text") if field in record}
            taken += len(record["text"])
            if taken >= characters:
                return


def _title(page: str) -> str:
    """The title of a page of WikiText: what stands between the signs of its first line."""
    return _plain(page.strip().partition("\n")[0].strip(" ="))


def _plain(title: str) -> str:
    """A title without the spaces and marks that tokenisation put into it."""
    return "".join(title.replace("@", "").split()).lower()


def _task(into: Folder, name: str, place: str, definition: Path) -> str:
    """Fetch the documents of a task of lm-eval, and write its definition over the local files.

    Args:
        name: of the local task.
        place: file of the documents, with ``{split}`` in it.
        definition: lm-eval's YAML file.

    Returns:
        The file of the documents that are evaluated.
    """
    config = load_yaml(definition, resolve_func=False)
    evaluated = config.get("test_split") or config["validation_split"]
    data = {}
    for split in filter(None, (evaluated, config.get("fewshot_split"))):
        source = Source(config["dataset_path"], config.get("dataset_name"), split)
        data[split] = place.format(split=split)
        into.write(data[split], source, source.records())
    local: dict[str, Any] = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data},
    }
    _define(into, name, local | {key: None for key in _SPLITS if config.get(key) not in data})
    return data[evaluated]


def _mmlu(into: Folder, definitions: list[Path]) -> str:
    """Fetch MMLU's subjects and write a group of them; returns the hash of the rows that are evaluated."""
    digest, names = hashlib.sha256(), []
    for definition in definitions:
        subject = definition.stem.removeprefix("mmlu_")
        names.append(f"mmlu_local_{subject}")
        evaluated = _task(into, names[-1], f"eval/mmlu/{{split}}/{subject}.jsonl", definition)
        digest.update(hash_of_rows(into.read(evaluated), MMLU_FIELDS).encode())
    metric = {"metric": "acc", "weight_by_size": True}
    _define(into, "mmlu_local", {"group": "mmlu_local", "task": names, "aggregate_metric_list": [metric]})
    return digest.hexdigest()


def _define(into: Folder, name: str, content: dict[str, Any]) -> None:
    path = into.path / "eval" / "yaml" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.data.fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files go; $LEAP_DATA has to name it afterwards")
    folder = parser.parse_args(arguments).folder.expanduser().resolve()
    try:
        different = fetch(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in different:
        print(f"{name}: not the rows of the tables in docs/results.md; compare your own runs only", file=sys.stderr)
    print(f"complete; export LEAP_DATA={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
