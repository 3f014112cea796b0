"""What files hold: texts as people have them, read; and anything else refused in one line that says where it stands."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data import documents
from pipeline.errors import UserError

TEXTS = ["the café keeps 3 weights", "a mask\nover two lines", "naïve «noise» 雲"]
RECORDS = [json.dumps({"id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(TEXTS)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _join(messages: list[dict[str, Any]]) -> str:
    return " ".join(f"{message['role']}: {message['content']}" for message in messages)


def _texts(file: Path | str, field: str = "text") -> list[str | None]:
    return list(documents.of_file(str(file), field, _join))


def _written(file: Path, octets: bytes) -> Path:
    file.write_bytes(octets)
    return file


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_text_is_the_same_whatever_system_wrote_it(tmp_path: Path, name: str, mark: bytes, end: str) -> None:
    parts = [f"{text}\n \t\n" for text in TEXTS] if ".txt" in name else RECORDS
    octets = mark + "\n".join(parts).replace("\n", end).encode()
    file = _written(tmp_path / name, gzip.compress(octets) if name.endswith(".gz") else octets)
    assert _texts(file) == TEXTS
    with fsspec.open(f"memory://{name}", "wb") as stored:
        stored.write(file.read_bytes())
    assert _texts(f"memory://{name}") == TEXTS


@pytest.mark.parametrize(
    "column",
    [pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode()],
    ids=["string", "large", "dictionary"],
)
def test_a_parquet_file_holds_texts_in_any_form_of_theirs(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert _texts(tmp_path / "a.parquet") == TEXTS


def test_a_record_without_a_text_is_none(tmp_path: Path) -> None:
    lines = ["{}", '{"text": null}', '{"text": ""}', '{"text": NaN}', '{"text": []}', '{"text": "half \\ud83d"}']
    for good in (0, len(lines)):
        some = [*lines[:good], RECORDS[0], *lines[good:], " ", '{"text": 1, "text": "the last counts"}']
        found = _texts(_written(tmp_path / "a.jsonl", "\n".join(some).encode()))
        assert found == [*[None] * good, TEXTS[0], *[None] * (len(lines) - good), "the last counts"]
    pq.write_table(pa.table({"text": [None, "a", ""]}), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == [None, "a", None]


@pytest.mark.parametrize(
    ("name", "octets", "message"),
    [
        ("a.jsonl", RECORDS[0].encode("latin-1"), "source: a.jsonl: line 2 is not UTF-8; convert the file to it"),
        ("a.txt", TEXTS[0].encode("latin-1"), "source: a.txt: line 2 is not UTF-8; convert the file to it"),
        ("a.txt", "a b".encode("utf-16-be"), "source: a.txt: line 2 holds the character NUL, as no text does"),
        ("a.jsonl", b'{"text": 5}', "text_field: line 2 of a.jsonl: text holds 5, not text"),
        ("a.jsonl", b'{"text": true}', "text_field: line 2 of a.jsonl: text holds True, not text"),
        ("a.jsonl", b'{"text": ["a"]}', "text_field: line 2 of a.jsonl: text holds a list, not text"),
        ("a.jsonl", b'{"text": {"b": "a"}}', "text_field: line 2 of a.jsonl: text holds a mapping, not text"),
        ("a.jsonl", b'{"text": "cut o', "source: a.jsonl: line 2 is not a JSON record; each line has to be one"),
        ("a.jsonl", b"[" * 10**5, "source: a.jsonl: line 2 is not a JSON record; each line has to be one"),
        ("a.json", b'[{"text": "a"}]', "source: a.json: line 2 is not a JSON record; each line has to be one"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path: Path, name: str, octets: bytes, message: str) -> None:
    file = _written(tmp_path / name, (b"good" if ".txt" in name else b'{"text": "good"}') + b"\n" + octets)
    with pytest.raises(UserError) as caught:
        _texts(file)
    assert str(caught.value) == message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    with pytest.raises(UserError, match=rf"source: {name} is UTF-16; convert the file to UTF-8"):
        _texts(_written(tmp_path / name, RECORDS[0].encode(encoding)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "cut.jsonl.gz", "none.jsonl", "folder.jsonl", "memory://none.txt"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    _written(tmp_path / "a.jsonl.gz", RECORDS[0].encode())
    _written(tmp_path / "cut.jsonl.gz", gzip.compress("\n".join(RECORDS * 99).encode())[:-20])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^source: \S+ cannot be read after line \d+: .+$"):
        _texts(name if "://" in name else tmp_path / name)


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array([b"a"]), "bytes"),
        (pa.array([{"b": 1}]), "a mapping"),
        (pa.array([["a"]]), "a list"),
        (pa.array([2.5]), "2.5"),
    ],
)
def test_a_parquet_column_of_something_else(tmp_path: Path, column: pa.Array, what: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"text_field: record 1 of a.parquet: text holds {what}, not text"):
        _texts(tmp_path / "a.parquet")
    _written(tmp_path / "b.parquet", b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"source: b\.parquet is not a parquet file"):
        _texts(tmp_path / "b.parquet")


def test_a_file_none_of_whose_records_has_the_field_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), tmp_path / "a.parquet")
    _written(tmp_path / "a.jsonl", b'{"title": "x"}\n{"body": "y"}\n')
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(UserError, match=f"text_field: no field text; the records of {name} have body, title"):
            _texts(tmp_path / name)

    def endless() -> Iterator[tuple[str, dict[str, Any]]]:
        while True:
            yield "somewhere", {"body": "y"}

    with pytest.raises(UserError, match="no field text; the records of all have body"):
        list(documents.of_records(endless(), "all", "text", _join))


def test_a_conversation_becomes_a_text_by_the_tokenizers_template(tmp_path: Path, tiny: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny / "model")
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in (CHAT, CHAT[:1]))
    _written(tmp_path / "a.jsonl", lines.encode())
    # Of unequal messages, so that the table has nulls.
    uneven = [[CHAT[0], {**CHAT[1], "name": "me"}], CHAT[:1]]
    pq.write_table(pa.table({"messages": uneven}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"1 of a\.\w+: messages holds a conversation .*: it has no chat template"):
            list(documents.of_file(str(tmp_path / name), "messages", documents.render_with(tokenizer)))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% if m.name is defined %} ({{ m.name }}){% endif %}{% endfor %}"
    )
    render = documents.render_with(tokenizer)
    found = [list(documents.of_file(str(tmp_path / f"a.{form}"), "messages", render)) for form in ("jsonl", "parquet")]
    assert found == [["<user>a<assistant>b", "<user>a"], ["<user>a<assistant>b (me)", "<user>a"]]
    _written(tmp_path / "b.jsonl", (lines + '{"messages": [{"role": "system", "content": "c"}]}\n').encode())
    with pytest.raises(UserError, match=r"line 3 of b\.jsonl: messages holds a conversation .*: no system, please"):
        list(documents.of_file(str(tmp_path / "b.jsonl"), "messages", render))
