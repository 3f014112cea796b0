"""Whether the tokenizer that transformers makes of a GGUF file is the file's own.

The file holds a vocabulary, merges or scores, and the name of a rule by which llama.cpp cuts texts; all else is code.
The few rules that most models have are written down here a second time, in plain Python, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from leap.checkpoint import CheckpointError

#: Texts in which rules differ: digits, blanks, contractions, scripts, code, line ends.
SAMPLES = (
    "Hello world, it's 2024! 1234567 apples cost $3.50 (don't ask).",
    "  two leading blanks,   three inside, and a tab\there\n\n\nand a line end\n",
    "def f(x):\n    return x[0] != 10 and x_1 >= 0x1F  # comment\n",
    "Ein Straßenname: Königsallee 12a. Café, naïve, œuvre; 北京是中国的首都。 Привет, мир! ¿Qué tal? नमस्ते",
    "WE'LL see IT'S Camel_Case and HTTPRequest2 https://example.com/a?b=c&d=1e-5 🙂👍🏽",
    "x\r\ny\r\n 1,000,000 ½ ² ٣٤ I'd've\u00a0done\u2003that",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
#: Rule of llama.cpp → how a text is cut before merging, one expression after the other.
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "codeshell": (r"\p{N}", _GPT2),
    "exaone": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
_NORMAL = 1
"""Type of a token that is neither special nor a byte."""


class GgufVocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        kind: ``gpt2`` (merges of bytes), ``llama`` (merges by score) or another.
        rule: by which texts are cut, for merges of bytes.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        fields = GGUFReader(path).fields

        def read(name: str, otherwise: Any = None) -> Any:
            field = fields.get(f"tokenizer.ggml.{name}")
            return otherwise if field is None else field.contents()

        self.kind: str = read("model", "")
        self.rule: str = read("pre", "default")
        self.tokens: list[str] = read("tokens", [])
        self.types: list[int] = read("token_type", [_NORMAL] * len(self.tokens))
        self.scores: list[float] = read("scores", [])
        self.ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(read("merges", []))}
        self.prefix_space: bool = read("add_space_prefix", True)
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    @property
    def cuts(self) -> tuple[str, ...] | None:
        """The expressions of its rule; none where the rule is not known here."""
        return _CUTS.get(self.rule) if self.kind == "gpt2" else None

    def encode(self, text: str) -> list[int] | None:
        """Token ids of a text without special tokens; None where its kind or rule is not known here."""
        if self.kind == "gpt2" and self.cuts is not None:
            return [number for piece in _cut(text, self.cuts) for number in self._merged_bytes(piece)]
        if self.kind == "llama" and self.scores:
            return self._merged_by_score(text)
        return None

    def _merged_bytes(self, piece: str) -> Sequence[int]:
        spelling = _byte_letters()
        parts = [spelling[byte] for byte in piece.encode()]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(range(len(pairs)), key=lambda at: self.ranks.get(pairs[at], len(self.ranks)))
            if pairs[best] not in self.ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
        return [self.ids[part] for part in parts]

    def _merged_by_score(self, text: str) -> list[int]:
        """SentencePiece's merging: of all neighbours whose union is a token, the one with the best score first."""
        parts = list((" " + text if self.prefix_space else text).replace(" ", "\u2581"))
        while len(parts) > 1:
            unions = [self.ids.get(a + b) for a, b in pairwise(parts)]
            known = [at for at, union in enumerate(unions) if union is not None]
            if not known:
                break
            best = max(known, key=lambda at: (self.scores[unions[at] or 0], -at))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [
            number
            for part in parts
            for number in ([self.ids[part]] if part in self.ids else [self.ids[f"<0x{b:02X}>"] for b in part.encode()])
        ]


def split_digits(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer the splitter that transformers leaves out: it makes every digit a token of its own.

    llama.cpp's rule asks for it in SmolLM's family and in StarCoder's, say.
    """
    from tokenizers import pre_tokenizers

    if GgufVocabulary(path).cuts == (r"\p{N}", _GPT2):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def check_tokenizer(tokenizer: Any, path: Path) -> bool:
    """Compare the tokenizer that was made of a GGUF file with the file's own on :data:`SAMPLES`.

    Returns:
        Whether it could be compared: the file's kind and rule may be unknown here.

    Raises:
        CheckpointError: they differ.
    """
    vocabulary = GgufVocabulary(path)
    for text in SAMPLES:
        expected = vocabulary.encode(text)
        if expected is None:
            return False
        got = tokenizer(text, add_special_tokens=False)["input_ids"]
        if got != expected:
            at = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
            raise CheckpointError(
                f"{path.name}: the tokenizer that transformers makes of it ({vocabulary.kind}, {vocabulary.rule}) cuts "
                f"texts otherwise than the file says, {tokenizer.convert_ids_to_tokens(got[at : at + 3])} in place of "
                f"{tokenizer.convert_ids_to_tokens(expected[at : at + 3])}: give the model's Hugging Face directory"
            )
    return True


def _cut(text: str, expressions: Sequence[str]) -> list[str]:
    pieces = [text]
    for expression in expressions:
        pieces = [part for piece in pieces for part in _isolated(piece, expression)]
    return pieces


def _isolated(text: str, expression: str) -> list[str]:
    """The matches of an expression, and what stands between them."""
    parts, at = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[at : match.start()], match[0]]
        at = match.end()
    return [part for part in [*parts, text[at:]] if part]


@cache
def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else the next one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printed}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}
