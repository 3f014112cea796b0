"""The reports and MLflow's pages in a real browser. Screenshots are left in ``build/screenshots``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, MlflowServer, chromium
from searches import searched
from test_report_page import SECTIONS, results, variant  # noqa: F401 - a fixture

from pipeline.config import TrackingConfig
from pipeline.reporting import make_figures, write_page
from pipeline.results.recording import variant_metrics
from pipeline.results.row import Row
from pipeline.tracking import make_tracker
from pipeline.tuning.report import render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser")) as context:
        yield context


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path, str], Any]]:
    """Opens a page in light or dark; it must say nothing on the console and ask for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def open_(file: Path, scheme: str) -> Any:
        page.emulate_media(color_scheme=scheme)
        page.goto(file.as_uri())
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 26)"}[scheme]
        # Nothing wider than the page, at a desk and on a telephone; what is wide scrolls by itself.
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        drawn = page.evaluate("Array.from(document.querySelectorAll('figure svg')).map(svg => svg.getBBox().width)")
        assert min(drawn) > 0
        _keep(page, f"{file.stem}-{scheme}")
        return page

    yield open_
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def _keep(page: Any, name: str, whole: bool = True) -> None:
    page.screenshot(path=str(SCREENSHOTS / f"{name}.png"), full_page=whole)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_without_errors_and_shows_every_section(
    opened: Callable[[Path, str], Any],
    results: Any,  # noqa: F811 - the fixture
    tmp_path: Path,
    scheme: str,
) -> None:
    page = opened(write_page(results, make_figures(results), tmp_path / "report.html"), scheme)
    for heading in SECTIONS:
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    assert page.locator("figure svg").count() == 13


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_search_opens_without_errors(
    opened: Callable[[Path, str], Any], tmp_path: Path, scheme: str
) -> None:
    summary, figures = searched(None, tmp_path)
    file = tmp_path / "search.html"
    file.write_text(render(summary, figures))
    page = opened(file, scheme)
    for heading in ("What was found", "Which fields matter", "Trials", "Provenance"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    assert page.locator("figure svg").count() == len(figures) == 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with two runs of two learned variants each."""
    directory = tmp_path_factory.mktemp("server")
    server = MlflowServer(directory)
    server.start()
    try:
        for name, gain in (("nano-aaaa1111", 0.0), ("nano-bbbb2222", 3.0)):
            tracker = make_tracker(TrackingConfig(uri=server.uri, experiment="leap"), directory / "runs" / name)
            with tracker.start_run(name, tags={"model": "nano", "seed": "0", "recipe": "nano"}) as run:
                run.log_params({"sparsities": [0.5, 0.6], "learn.leap.settings.steps": 60})
                for row in (variant("leap", 0.5, 30.4 - gain, 0.37), variant("leap", 0.6, 60.0 - gain, 0.34)):
                    tags = {"stage": "variant", "method": "leap", "sparsity": f"{row['target_sparsity']:g}"}
                    with run.child(row["name"], tags) as child:
                        child.log_params({"method": "leap", "target_sparsity": row["target_sparsity"]})
                        child.log_metrics(variant_metrics(Row(**row, block_sparsity=0.0), {}))
                run.log_metrics({"seconds": 12.0 + gain})
        yield server
    finally:
        server.kill()


def test_mlflow_lists_the_runs_and_compares_two(browser: Any, server: MlflowServer) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("leap").experiment_id
    page = browser.new_page()
    page.goto(f"{server.uri}/#/experiments/{experiment}/runs", wait_until="domcontentloaded")
    for name in ("nano-aaaa1111", "nano-bbbb2222"):
        page.get_by_text(name).first.wait_for()
    _keep(page, "mlflow-runs", whole=False)
    found = client.search_runs([experiment], "tags.stage = 'variant' and tags.sparsity = '0.5'")
    ids = [run.info.run_id for run in found]
    assert len(ids) == 2
    chosen = ",".join(f'"{id_}"' for id_ in ids)
    page.goto(
        f'{server.uri}/#/compare-runs?runs=[{chosen}]&experiments=["{experiment}"]', wait_until="domcontentloaded"
    )
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    for text in ("target_sparsity", "perplexity.wikitext2", "acc.mean", "30.4", "27.4"):
        page.get_by_text(text, exact=False).first.wait_for(state="attached")
    _keep(page, "mlflow-compare")
    page.close()
