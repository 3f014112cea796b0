"""Models from Hugging Face checkpoints that hold what the model needs, no less and no more.

transformers fills a tensor that the files lack with random numbers, leaves aside one that the model has no place for,
and tells neither but in its log. Here both are errors, known from the headers of the files before a weight is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from leap.surgery import check_no_adapter

#: Tensors that files may hold or lack whatever the model, by a pattern of their names. transformers knows more, by
#: family: heads that predict several tokens ahead, say.
HARMLESS = {
    r"(^|\.)rotary_emb\.inv_freq$": "follows from config.json; stored by older versions of transformers",
    r"(^|\.)position_ids$": "counts from 0; stored by older versions of transformers",
    r"\.(attn|attention|self_attn)\.(masked_)?bias$": "the causal mask of GPT-2's relatives, no parameter",
}
_NAMED = 3
"""How many tensors of a kind an error names."""
_ROWS = 4096
"""Rows of a matrix that are compared at a time."""
_POINTER = b"version https://git-lfs"
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not that of the model that its config.json describes; one line says why."""


class Checkpoint:
    """A checkpoint whose files are whole and hold the tensors of its model, under their names and in their shapes.

    Reads the headers of the files; those of a hub name are downloaded for that.

    Args:
        source: a Hugging Face directory with safetensors, or the name of a model on the hub.
        revision: of a hub name.
        trust_remote_code: run code that comes with the model.

    Attributes:
        config: the model's configuration. Where it ties two tensors of which the files hold both, and not the same,
            it ties them no longer (``untied``); that is what transformers computes with.
        files: what the weights lie in.

    Raises:
        CheckpointError: see there.
    """

    def __init__(self, source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.source, self.revision, self.trust_remote_code = str(source), revision, trust_remote_code
        check_no_adapter_files(self.source)
        self.config = self._from_pretrained(AutoConfig)
        self.files = self._find_files()
        skeleton = meta_model(self.config, self.source, trust_remote_code)
        check_tensors(skeleton, headers(self.files), self.source)
        with StoredTensors(self.files, skeleton) as stored:
            ties = [pair for pair in skeleton.all_tied_weights_keys.items() if all(name in stored for name in pair)]
            self.untied = not all(stored.equal(*pair) for pair in ties)
        if self.untied:
            untie(self.config)

    def check_finite(self) -> None:
        """Read all weights, one in memory at a time, and check them for NaN and infinity.

        Raises:
            CheckpointError: there are some; it names the tensor.
        """
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise CheckpointError(f"{path}: {name} holds NaN or Inf")

    def load(self, **options: Any) -> PreTrainedModel:
        """The model in evaluation mode, on the CPU if ``options``, which are those of ``from_pretrained``, say nothing.

        Raises:
            CheckpointError: see there; and for an adapter that lies beside the model.
        """
        loaded = self._from_pretrained(
            AutoModelForCausalLM, config=self.config, use_safetensors=True, output_loading_info=True, **options
        )
        return checked(loaded, self.source).eval()

    def _from_pretrained(self, auto: Any, **options: Any) -> Any:
        options |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return attempt(self.source, lambda: auto.from_pretrained(self.source, **options))

    def _find_files(self) -> list[Path]:
        """What transformers reads: one file if there is, else those that the index names, whatever lies beside them."""
        if single := self._find(getattr(self.config, "transformers_weights", None) or SAFE_WEIGHTS_NAME):
            return [single]
        index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            raise CheckpointError(f"{self.source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged, it maps no tensors to files") from error
        files = [self._find(name) for name in names]
        if None in files:
            lost = names[files.index(None)]
            raise CheckpointError(f"{self.source} lacks {lost}, which {SAFE_WEIGHTS_INDEX_NAME} names")
        return [file for file in files if file is not None]

    def _find(self, name: str) -> Path | None:
        options = {"revision": self.revision, "_raise_exceptions_for_missing_entries": False}
        found = attempt(self.source, lambda: cached_file(self.source, name, **options))
        return Path(found) if found else None


def check_no_adapter_files(directory: str) -> None:
    """Check that a directory holds no adapter: transformers would attach it to the model where peft is installed.

    Raises:
        CheckpointError: it does.
    """
    if (Path(directory) / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json): merge the adapter first (model.merge_and_unload()), "
            "and give the directory of the merged model without the adapter's files"
        )


class StoredTensors:
    """The tensors of safetensors files by the names that ``model`` gives them, whatever files they lie in.

    Some families are stored under older names (GPT-NeoX's head, say), which transformers renames in loading. What it
    puts together from several tensors (experts) is not here.
    """

    def __init__(self, files: Iterable[Path], model: PreTrainedModel) -> None:
        self._stack = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        names = model.state_dict()
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 - not a dict
                self._where[rename_source_key(key, renamings, [], model.base_model_prefix, names)[0]] = file, key

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def as_stored(self, name: str) -> bool:
        """Whether a tensor lies in the files under its own name."""
        return name in self._where and self._where[name][1] == name

    def get(self, name: str) -> Tensor:
        """The tensor, read now."""
        file, key = self._where[name]
        return file.get_tensor(key)

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices are the same, a part in memory at a time."""
        a, b = (file.get_slice(key) for file, key in (self._where[one], self._where[other]))
        if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
            return False
        starts = range(0, a.get_shape()[0], _ROWS)
        return all(torch.equal(a[start : start + _ROWS], b[start : start + _ROWS]) for start in starts)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Tensors of the state dict with all names each goes by, itself first."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files by its stored name, on the device meta.

    Raises:
        CheckpointError: a file is cut off, a git-LFS pointer or something else.
    """
    stored: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                stored |= {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} {_damage(path)} ({error})") from error
    return stored


def meta_model(config: Any, source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM of a configuration, without memory for its weights.

    Args:
        source: for errors.

    Raises:
        CheckpointError: it is none that can be built, or its weights are quantised.
    """
    for part in (config, config.get_text_config()):
        if quantised := getattr(part, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
            raise CheckpointError(
                f"{source}: its weights are quantised ({getattr(method, 'value', method)}); give the model that it was "
                "made from, in float32, bfloat16 or float16"
            )

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return attempt(source, build)


def check_tensors(skeleton: PreTrainedModel, stored: Mapping[str, Tensor], source: str) -> None:
    """Let transformers load tensors without values, and see whether they are those of the model.

    Args:
        skeleton: from :func:`meta_model`; stays as it is.
        stored: what the files hold, by its stored name, on the device meta.

    Raises:
        CheckpointError: a tensor is missing, one too many, or of another shape.
    """
    try:
        with _quiet():
            loaded: Any = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=dict(stored),
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:  # tensors that should become one do not fit together
        expected = revert_weight_conversion(skeleton, skeleton.state_dict())
        _judge(expected.keys() - stored.keys(), stored.keys() - expected.keys(), [], source)
        raise CheckpointError(f"{source}: its tensors do not become those of the model") from error
    checked(loaded, source)


def load_gguf(path: Path, **options: Any) -> PreTrainedModel:
    """The model of a GGUF file, dequantised, in evaluation mode; ``options`` are those of ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read, or does not hold the model that it describes.
    """
    options |= {"gguf_file": path.name, "output_loading_info": True}
    loaded: Any = attempt(str(path), lambda: AutoModelForCausalLM.from_pretrained(path.parent, **options))
    return checked(loaded, str(path)).eval()


def checked(loaded: tuple[PreTrainedModel, Mapping[str, Any]], source: str) -> PreTrainedModel:
    """The model of what ``from_pretrained`` gave with ``output_loading_info``, if all its weights came from the files.

    Raises:
        CheckpointError: they did not, or an adapter came along with them.
    """
    model, info = loaded
    _judge(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], source)
    try:
        check_no_adapter(model)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return model


def untie(config: Any) -> None:
    """Say in a configuration that the output head has weights of its own."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def attempt(source: str, read: Callable[[], T]) -> T:
    """What ``read`` gives.

    Raises:
        CheckpointError: with the reason, whatever kind of error it is. What reads a model raises many: of the hub's
            client, strict configurations, safetensors, quantisers, code that came along and imports what is not there.
    """
    try:
        return read()
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot load {source}: {reason[:300]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report and progress bar: the one tells what the error tells, the other of no reading."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(verbosity)


def _judge(
    missing: Collection[str], unexpected: Collection[str], mismatched: Collection[tuple[str, Any, Any]], source: str
) -> None:
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in HARMLESS)]
    shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in mismatched]
    kinds = (("lacks", missing), ("has besides", unexpected), ("has in another shape", shapes))
    found = [f"{verb} {_named(names)}" for verb, names in kinds if names]
    if found:
        raise CheckpointError(f"{source} does not hold the model of its config.json: it {'; it '.join(found)}")


def _named(names: Collection[str]) -> str:
    shown = sorted(names, key=dot_natural_key)[:_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _damage(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return "is a git-LFS pointer and not the file itself; fetch that with git lfs pull"
    except OSError:
        return "cannot be read"
    return "is cut off or no safetensors file"
