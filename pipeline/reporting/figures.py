"""Every figure of a run, for the page (as SVG) and for the tracker (as PNG)."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from pipeline.reporting import summary, theme
from pipeline.reporting.plots import bars, decoding, layers, learning_curves, mask_tiles, pareto, timeline
from pipeline.results.schema import RunResults


def make_figures(results: RunResults) -> dict[str, Figure]:
    """The figures that the results allow, by name.

    They are ``pareto``, ``perplexity``, ``accuracy``, ``speed``, ``stages`` and, for the variants that have them,
    ``training/<variant>``, ``layers/<variant>`` and ``masks/<variant>``.
    """
    with matplotlib.rc_context(theme.STYLE):
        figures = {
            "pareto": pareto.pareto_figure(results),
            "perplexity": bars.perplexity_figure(results),
            "accuracy": bars.accuracy_figure(results),
            "speed": decoding.speed_figure(results),
            "stages": timeline.stages_figure(results.get("stages", [])),
        }
        for name, curves in results.get("training", {}).items():
            figures[f"training/{name}"] = learning_curves.training_figure(curves)
        limits = layers.limits(results)
        for variant in summary.variants(results):
            figures[f"layers/{variant.get('name', '?')}"] = layers.layers_figure(variant, limits)
            figures[f"masks/{variant.get('name', '?')}"] = mask_tiles.masks_figure(variant)
    return {name: figure for name, figure in figures.items() if figure is not None}
