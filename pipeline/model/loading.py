"""From the ``model`` section of a recipe to weights and tokenizer on this node."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from leap.checkpoint import Checkpoint, CheckpointError, attempt, check_no_adapter_files
from leap.checkpoint import check_tensors as compare_tensors
from leap.checkpoint import meta_model as build_on_meta
from pipeline.artifacts import checksums
from pipeline.config import ModelConfig
from pipeline.data import content, hub
from pipeline.errors import UserError
from pipeline.model import gguf_files

#: Of the files that say what a model is: weights, configuration, tokenizer, code that comes with it.
_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".tiktoken", ".jinja", ".py"}
EMBEDDED = Path(__file__).parents[1] / "nano" / "model"


def locate(config: ModelConfig) -> str:
    """A local directory, or the name of a model on the hub; converts GGUF files on first use.

    Raises:
        UserError: there is no such model.
    """
    if config.source == "nano":
        return str(EMBEDDED)
    if config.source.startswith("gguf:"):
        package = config.source.removeprefix("gguf:")
        files = gguf_files.of_package(package)
        return str(_converted_gguf(package, files, importlib.metadata.version(package.replace("_", "-"))))
    path = Path(os.path.expandvars(config.source)).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        files = gguf_files.of_path(path.resolve())
        digest = checksums.of_bytes("".join(content.of_files(files)).encode())
        return str(_converted_gguf(path.stem, files, digest[:16]))
    if path.is_dir():
        with _as_user_error():
            check_no_adapter_files(str(path))
        if not (path / "config.json").is_file():
            raise UserError(f"model.source: {config.source} has no config.json; give a Hugging Face model directory")
        if not list(path.glob("*.safetensors")):
            raise UserError(f"model.source: {config.source} has no *.safetensors file; other formats are not read")
        return str(path)
    if config.source.startswith((".", "/", "~")) or config.source.count("/") != 1 or not hub.is_name(config.source):
        raise UserError(
            f"model.source: {config.source} is neither nano, a directory, a .gguf file, gguf:PACKAGE nor a hub name a/b"
        )
    return config.source


def load_config(config: ModelConfig) -> Any:
    """The model's Hugging Face configuration."""
    # The first thing that is read of a model: without a network it fails here at once, not after minutes of retries.
    offline = not Path(locate(config)).is_dir() and not hub.answers()
    return _from_pretrained(AutoConfig, config, local_files_only=offline)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: there is none, or none whose rules lie in one file, which its texts are known by.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if not tokenizer.is_fast:
        raise UserError(
            f"model.source: {type(tokenizer).__name__} has no fast form (tokenizer.json); others are not read"
        )
    return tokenizer


def load_model(config: ModelConfig, directory: str | Path | None = None) -> PreTrainedModel:
    """The model, or its pruned export in ``directory``, in evaluation mode on the CPU."""
    return load(checkpoint(config, directory), config)


def load_stored_model(config: ModelConfig) -> PreTrainedModel:
    """The model in the number type of its files, which are mapped and read where a weight is used; on the CPU."""
    found = checkpoint(config)
    with _as_user_error():
        return found.load(dtype="auto")


def checkpoint(config: ModelConfig, directory: str | Path | None = None) -> Checkpoint:
    """The files of the model, or of its export in ``directory``, which hold what they should.

    Raises:
        UserError: they do not.
    """
    if directory:
        return Checkpoint(directory, trust_remote_code=config.trust_remote_code)
    with _as_user_error():
        return Checkpoint(locate(config), revision=config.revision, trust_remote_code=config.trust_remote_code)


def load(found: Checkpoint, config: ModelConfig) -> PreTrainedModel:
    """The model of a checkpoint in the number type of ``config``, in evaluation mode on the CPU."""
    with _as_user_error():
        return found.load(dtype=getattr(torch, config.dtype))


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model without memory for its weights.

    Raises:
        UserError: there is none, or it is none that can be built.
    """
    with _as_user_error():
        return build_on_meta(load_config(config), locate(config), config.trust_remote_code)


def check_tensors(config: ModelConfig) -> None:
    """Check that the model's files hold its tensors, and, where they lie on this machine, finite numbers.

    Of files on the hub only the headers are fetched.

    Raises:
        UserError: they do not.
    """
    source = locate(config)
    if Path(source).is_dir() or not hub.answers():
        found = checkpoint(config)
        with _as_user_error():
            found.check_finite()
        return
    with _as_user_error():
        metadata = attempt(source, lambda: get_safetensors_metadata(source, revision=config.revision))
        files = metadata.files_metadata.values()
        shapes = {name: tensor.shape for file in files for name, tensor in file.tensors.items()}
        stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        compare_tensors(meta_model(config), stored, source)


def _from_pretrained(auto: Any, config: ModelConfig, **options: Any) -> Any:
    source = locate(config)
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with _as_user_error():
        return attempt(source, lambda: auto.from_pretrained(source, **options))


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise UserError(f"model.source: {error}") from error


def identity(config: ModelConfig) -> str:
    """What tells this model from any other: the commit of a hub name, else a hash over the whole of its files."""
    source = locate(config)
    if not Path(source).is_dir():
        return f"{source}@{hub.commit('model', source, config.revision)}"
    return content.of_directory(source, _SUFFIXES)


def _converted_gguf(source: str, files: list[Path], version: str) -> Path:
    """The GGUF files of a model, converted once to a Hugging Face directory in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "leap-prune" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{source}-{version}"
    with (cache / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may ask for it at once
        if not target.exists():
            partial = Path(tempfile.mkdtemp(dir=cache))
            try:
                with _as_user_error():
                    gguf_files.convert(files, partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target
