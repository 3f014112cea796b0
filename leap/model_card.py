"""The README.md of a pruned model: what was done to it, and how it is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from leap.packed import FILE_NAME

if TYPE_CHECKING:
    from leap.api import PruneResult


def model_card(result: PruneResult, name: str) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        name: of the model, as it is loaded: a directory or a name on the hub.
    """
    settings, base = result.settings, str(result.model.config.name_or_path)
    # A path on somebody's machine is no base model.
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not base.endswith("/")
    method = f"LEAP: a mask learned in {settings.steps} steps of {settings.batch_rows} rows over "
    method += "frozen weights" if settings.weights == "dense" else f"the weights of {settings.prior}"
    facts = {
        "method": method,
        "start": f"{settings.prior}'s scores",
        "sparsity": f"{100 * result.sparsity:g} % of the {result.blocks.prunable:,} prunable weights; "
        f"{100 * result.block_sparsity:.2f} % of all weights of the decoder blocks",
        "exact within": settings.family.scope_name,
        "pattern": settings.family.pattern_name,
        "text": result.text,
    }
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {base}"] if on_hub else []),
        "tags: [leap, pruned, sparse, unstructured-sparsity]",
        "---",
        f"# {name.rstrip('/').rpartition('/')[2]}",
        "",
        f"{base.rstrip('/').rpartition('/')[2] or type(result.model).__name__} with "
        f"{100 * result.sparsity:g} % of its weights set to zero.",
        "",
        _table({"": "", **facts}),
        "",
        *_measured(result),
        "## Sparsity of its layers",
        "",
        _table({"layers": "zeros", **_by_kind(result)}),
        "",
        "## Load it",
        "",
        "As any model; engines such as vLLM and SGLang read it, too, and gain no speed from its zeros:",
        "",
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```',
        "",
        "Packed, for decoding through kernels that read only what was kept (`pip install leap-prune`):",
        "",
        f'```python\nimport leap\n\nleap.write_sparse("{name}", "packed/")  # a local directory\n'
        'model = AutoModelForCausalLM.from_pretrained("packed/")\n```',
        "",
        f"`{FILE_NAME}` holds the masks at one bit a weight (`leap.MaskFile`). To train the model on with its zeros: "
        "`leap.keep_sparse(model)`.",
    ]
    return "\n".join(parts) + "\n"


def _table(cells: Mapping[str, str]) -> str:
    (head, first), *rest = cells.items()
    lines = [f"| {head} | {first} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rest)]
    return "\n".join(lines)


def _measured(result: PruneResult) -> list[str]:
    loss = {"held-out perplexity": "", **{name: f"{value:.2f}" for name, value in result.perplexity.items()}}
    return ["## Measured", "", _table(loss), ""] if result.perplexity else []


def _by_kind(result: PruneResult) -> dict[str, str]:
    """Share of zeros of the layers that do the same in their blocks."""
    zeros: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, share in result.layer_sparsity.items():
        size = result.model.get_submodule(name).weight.numel()  # type: ignore[operator]
        of_kind = zeros[name.rpartition(".")[2]]
        of_kind[0] += share * size
        of_kind[1] += size
    return {f"`{kind}`": f"{100 * pruned / size:.1f} %" for kind, (pruned, size) in zeros.items()}
