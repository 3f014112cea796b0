"""Every figure of a run, for the page (as SVG) and for the tracker (as PNG)."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from pipeline.reporting import summary, theme
from pipeline.reporting.plots import layers, masks, pareto, speed, stages, training, variants
from pipeline.reporting.schema import RunResults


def make_figures(results: RunResults) -> dict[str, Figure]:
    """The figures that the results allow, by name.

    They are ``pareto``, ``perplexity``, ``accuracy``, ``speed``, ``stages`` and, for the variants that have them,
    ``training/<variant>``, ``layers/<variant>`` and ``masks/<variant>``.
    """
    with matplotlib.rc_context(theme.STYLE):
        figures = {
            "pareto": pareto.pareto_figure(results),
            "perplexity": variants.perplexity_figure(results),
            "accuracy": variants.accuracy_figure(results),
            "speed": speed.speed_figure(results),
            "stages": stages.stages_figure(results.get("stages", [])),
        }
        for name, curves in results.get("training", {}).items():
            figures[f"training/{name}"] = training.training_figure(curves)
        limits = layers.limits(results)
        for variant in summary.variants(results):
            figures[f"layers/{variant.get('name', '?')}"] = layers.layers_figure(variant, limits)
            figures[f"masks/{variant.get('name', '?')}"] = masks.masks_figure(variant)
    return {name: figure for name, figure in figures.items() if figure is not None}
