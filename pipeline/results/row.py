"""One row of the table of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pipeline.evaluation.scores import Sample
from pipeline.evaluation.speed import Speed
from pipeline.results import schema
from pipeline.stages.mask_map import Tiles
from pipeline.stages.origin import Origin

#: Null in JSON where there is none; what else is none is left out.
_NULLABLE = {"target_sparsity", "mean_accuracy", "mean_above_chance"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant, or the mean over several seeds."""

    name: str
    """``dense`` or method and sparsity, such as ``wanda@0.5``."""
    method: str
    origin: Origin
    target_sparsity: float | None
    """What was asked for; none for the dense model."""
    real_sparsity: float
    """What was counted in the exported weights, over the prunable ones."""
    block_sparsity: float
    """The same zeros over all weights of the decoder blocks."""
    scope: str
    """Within what the sparsity is exact: ``global``, ``layer``, ``row`` or a pattern such as ``2:4``."""
    weights_changed: bool
    """Whether the kept weights differ from the dense model's."""
    training_tokens: int
    """Tokens that the mask was learned from; zero where it was not learned."""
    perplexity: Mapping[str, schema.Perplexity]
    tasks: Mapping[str, schema.TaskAccuracy]
    mean_accuracy: schema.MeanAccuracy | None
    mean_above_chance: schema.MeanAccuracy | None
    """Over the tasks on which the dense model is clearly above chance."""
    against: Mapping[str, schema.Difference] | None = None
    """This variant minus the dense model and, where it was learned, minus layer-wise ones, by their names."""
    rival: str | None = None
    """The best layer-wise variant of the same sparsity, by perplexity on the first text, where this one was learned."""
    seed: int | None = None
    """Of the learning run."""
    mean: str | None = None
    """The row that this one, of a single seed, went into."""
    seeds: Sequence[int] | None = None
    """Of the variants that this row is the mean of: row by row, document by document, the perplexity geometric."""
    spread: schema.Spread | None = None
    """Between those seeds."""
    seconds: float | None = None
    """Time to make the mask."""
    decode_tokens_per_second: float | None = None
    speed: Speed | None = None
    directory: str | None = None
    """URI of the export."""
    sparsity_per_layer: Mapping[str, float] | None = None
    """By full module name, such as ``model.layers.0.self_attn.q_proj``."""
    mask_map: Tiles | None = None
    samples: Sequence[Sample] | None = None

    def as_json(self) -> schema.JsonRow:
        """As results.json has it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # A layer-wise variant has no rival, which is said; the dense one has no differences at all.
        null = _NULLABLE | ({"rival"} if self.against is not None else set())
        return cast(schema.JsonRow, {name: v for name, v in values.items() if v is not None or name in null})
