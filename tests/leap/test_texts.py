"""Rows of tokens from all that a user may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from leap.texts import token_rows

DOCUMENTS = ["ab c", "", "defg", "h"]


class Letters:
    """A tokenizer with a token for each character, and 0 as the end of a text."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        self.seen += len(texts)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def letters(rows: torch.Tensor) -> list[str]:
    assert rows.dtype == torch.int64
    return ["".join(map(chr, row)).replace("\0", "|") for row in rows.tolist()]


def test_documents_follow_one_another_in_rows() -> None:
    assert letters(token_rows(DOCUMENTS, Letters(), 4, 100)) == ["ab c", "|def", "g|h|"]
    assert letters(token_rows("ab c defg", Letters(), 4, 100)) == ["ab c", " def"]
    assert letters(token_rows(iter(DOCUMENTS), Letters(), 2, 4)) == ["ab", " c"], "no more than is wanted"


def test_a_long_text_is_read_as_far_as_it_is_wanted() -> None:
    tokenizer = Letters()
    rows = token_rows((f"document {number}" for number in range(10**9)), tokenizer, 10, 1000)
    assert rows.shape == (100, 10)
    assert tokenizer.seen <= 128


def test_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"text": DOCUMENTS, "other": ["x"] * 4})
    expected = ["ab c", "|def", "g|h|"]
    assert letters(token_rows(texts, Letters(), 4, 100)) == expected
    assert letters(token_rows(texts.to_iterable_dataset(), Letters(), 4, 100)) == expected
    assert letters(token_rows(texts, Letters(), 4, 100, field="other")) == ["x|x|", "x|x|"]
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]], "text": ["a", "b"]})
    assert token_rows(ids, None, 4, 100).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match=r"no column content, it has text, other; give text_field"):
        token_rows(texts, Letters(), 4, 100, field="content")
    with pytest.raises(ValueError, match="choose one of train, test"):
        token_rows(datasets.DatasetDict(train=texts, test=texts), Letters(), 4, 100)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_rows_stay_as_they_are(kind) -> None:
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert token_rows(kind(rows), None, 2, 9).tolist() == rows
    assert token_rows(rows, None, 2, 6).tolist() == rows[:2], "as many as are wanted"


def test_token_ids_of_documents_are_packed() -> None:
    assert token_rows([[1, 2, 3], [4], [5, 6]], Letters(), 3, 100).tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 0]]


def test_a_text_shorter_than_a_row_is_one_short_row() -> None:
    with pytest.warns(UserWarning, match="3 tokens, less than a row of 512"):
        assert letters(token_rows("ab", Letters(), 512, 10_000)) == ["ab|"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "no text"),
        ("", "no text"),
        (["", ""], "no text"),
        ([3.5], "string or token ids, not float"),
        ([None], "string or token ids, not NoneType"),
        ([["a", "b"]], "string or token ids, not list"),
        (torch.zeros(3), r"rows must be token ids .*\[3\]"),
    ],
)
def test_what_is_no_text_is_refused(text, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_rows(text, Letters(), 4, 100)


def test_strings_want_a_tokenizer_and_a_file_is_not_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        token_rows("abc", None, 4, 100)
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(ValueError, match="is the name of a file"):
        token_rows(str(tmp_path / "text.txt"), Letters(), 4, 100)
