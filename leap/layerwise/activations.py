"""The hidden states between decoder blocks, held for all calibration rows at once, one block at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCall:
    """What a decoder block is called with besides the hidden states (attention mask, position embeddings, ...)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_keyword: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What ``block`` returns for these hidden states."""
        if self.hidden_by_keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return replace(self, args=_map_tensors(self.args, move), kwargs=_map_tensors(self.kwargs, move))


class Activations:
    """Hidden states entering the current block for every row, [rows, seq, hidden], advanced in place block by block.

    The embedding runs once. How each block is called is recorded from a forward of one batch in which the blocks are
    replaced by stubs, so that nothing else is computed; a last batch of fewer rows gets a recording of its own.

    Args:
        model: a causal LM called as ``model(input_ids=..., use_cache=False)``, in eval mode.
        blocks: its decoder blocks, each called once and in order, hidden states in and hidden states out.
        rows: token ids [rows, seq].
        batch_rows: rows in one forward of a block.
        device: where blocks are brought to run; None runs them where they are.
        spill_dir: folder for a file that holds the hidden states instead of memory; it is gone when the process ends,
            however it ends.

    Raises:
        ValueError: the model calls its blocks in another way than described, or gives them arguments that depend on
            the tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        rows: Tensor,
        *,
        batch_rows: int,
        device: torch.device | None,
        spill_dir: Path | None,
    ) -> None:
        self._device = device
        self._batch_rows = batch_rows
        self._calls: dict[int, list[BlockCall]] = {}
        home = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
        for start, batch in zip(range(0, len(rows), batch_rows), rows.split(batch_rows), strict=True):
            hidden, (call,) = _trace(model, batch.to(home), blocks[:1])
            if len(batch) not in self._calls:
                self._calls[len(batch)] = self._record(model, batch.to(home), blocks, hidden, call)
            elif not _equal(call, self._calls[len(batch)][0]):
                raise ValueError(
                    "the decoder blocks get arguments that depend on the tokens; they cannot run one by one"
                )
            if start == 0:
                self._hidden = _allocate((len(rows), *hidden.shape[1:]), hidden, spill_dir)
            self._hidden[start : start + len(batch)] = hidden

    def run(self, block: nn.Module, index: int, *, advance: bool) -> None:
        """Runs all rows through ``block``, number ``index`` of the stack, on the device it is on.

        Args:
            advance: store the outputs as the inputs of the next block; otherwise they are dropped, which serves to
                collect statistics with hooks.
        """
        device = next(block.parameters()).device
        calls = {size: recorded[index].to(device) for size, recorded in self._calls.items()}
        for hidden in self._hidden.split(self._batch_rows):
            output = _hidden_of(calls[len(hidden)].run(block, hidden.to(device)))
            if output.shape != hidden.shape or output.dtype != hidden.dtype:
                raise ValueError(
                    f"decoder block {index} turns {_describe(hidden)} into {_describe(output)}; the two have to agree"
                )
            if advance:
                hidden.copy_(output)

    def _record(
        self, model: nn.Module, batch: Tensor, blocks: nn.ModuleList, hidden: Tensor, call: BlockCall
    ) -> list[BlockCall]:
        # Stubs have to return what the model's loop over the blocks expects, a tensor or a tuple that starts with one;
        # the first block, run for real, tells which.
        with on_device(blocks[0], self._device):
            device = next(blocks[0].parameters()).device
            output = call.to(device).run(blocks[0], hidden.to(device))
        extras = _map_tensors(output[1:], lambda t: t.to(hidden.device)) if isinstance(output, tuple) else None
        _, calls = _trace(model, batch, blocks, lambda h: h if extras is None else (h, *extras))
        return calls


@contextmanager
def on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Keeps ``block`` on ``device`` for the duration and brings it back; None leaves it where it is."""
    if device is None:
        yield
        return
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


class _AllCallsSeenError(Exception):
    """Ends a forward at the last block: nothing behind it, the large output head above all, has to run."""


def _trace(
    model: nn.Module,
    batch: Tensor,
    blocks: Sequence[nn.Module] | nn.ModuleList,
    stub_output: Callable[[Tensor], Any] = lambda hidden: hidden,
) -> tuple[Tensor, list[BlockCall]]:
    """Hidden states [batch, seq, hidden] that enter the first of ``blocks``, and the call of each, without running any.

    Each block but the last, at which the forward ends, is replaced by ``stub_output`` of its input.
    """
    entering: list[Tensor] = []
    calls: list[BlockCall] = []

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index != len(calls):
                raise ValueError(f"decoder block {index} was called out of order, or twice")
            hidden, call = _split_call(args, kwargs)
            entering.append(hidden)
            calls.append(call)
            if index == len(blocks) - 1:
                raise _AllCallsSeenError
            return stub_output(hidden)

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, stub(index)))
        try:
            model(input_ids=batch, use_cache=False)
        except _AllCallsSeenError:
            return entering[0], calls
    raise ValueError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} decoder blocks in a forward")


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # accelerate's hooks put a forward of their own on the instance; that one has to come back.
    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs, hidden_by_keyword=False)
    if "hidden_states" not in kwargs:
        raise ValueError("a decoder block got its hidden states neither first nor as hidden_states")
    others = dict(kwargs)
    return others.pop("hidden_states"), BlockCall((), others, hidden_by_keyword=True)


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _allocate(shape: tuple[int, ...], like: Tensor, spill_dir: Path | None) -> Tensor:
    if spill_dir is None:
        return like.new_empty(shape)
    spill_dir.mkdir(parents=True, exist_ok=True)
    # The file loses its name at once and lives on as the mapping, so a killed process leaves nothing behind.
    with tempfile.NamedTemporaryFile(dir=spill_dir, prefix="hidden-") as file:
        size = torch.Size(shape).numel()
        return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)


def _map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(value, function) for value in tree)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(tree, note)
    return found


def _equal(left: BlockCall, right: BlockCall) -> bool:
    lefts, rights = _tensors((left.args, left.kwargs)), _tensors((right.args, right.kwargs))
    return len(lefts) == len(rights) and all(map(torch.equal, lefts, rights))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
