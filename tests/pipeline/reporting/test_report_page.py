import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from pipeline.formatting import count, duration, percent, perplexity
from pipeline.reporting import headline, make_figures, print_report, render_page, result_rows, write_page
from pipeline.reporting.plots.layers import table as layer_table
from pipeline.reporting.svg import inline_svg

TASKS = ("piqa", "arc_easy", "winogrande")
SECTIONS = [
    "Results",
    "Learning the mask",
    "Speed",
    "Where the zeros are",
    "The masks",
    "Generated text",
    "Time",
    "Calibration data",
    "Artifacts and records",
    "Provenance",
]
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def variant(method, target, ppl, acc, *, spread=0.0):
    name = "dense" if target is None else f"{method}@{target:g}"
    layers = (
        {f"model.layers.{i}.{p}": target + spread * (i - 1) for i in range(3) for p in PROJECTIONS} if target else {}
    )
    return {
        "name": name,
        "method": method,
        "origin": "dense" if target is None else "learned" if method == "leap" else "layer-wise",
        "target_sparsity": target,
        "real_sparsity": target or 0.0,
        "scope": "global",
        "weights_changed": method == "admm",
        "perplexity": {"wikitext2": {"perplexity": ppl, "stderr_nll": 0.01, "tokens": 4096}},
        "tasks": {task: {"acc": acc + i / 20, "acc_stderr": 0.03, "documents": 100} for i, task in enumerate(TASKS)},
        "mean_accuracy": {"acc": acc + 0.05, "stderr": 0.01},
        "mean_above_chance": {"acc": acc, "stderr": 0.02},
        "seconds": 105.0,
        "directory": f"runs/test/{name}",
        "sparsity_per_layer": layers,
        "mask_map": {name: [[0.2, 0.8, 0.5], [0.5, 0.4, 0.6]] for name in layers},
        "samples": [{"prompt": "Once <upon", "continuation": f"a time {name}"}],
        "training_tokens": 2048 if method == "leap" else 0,
    }


def difference(nll, acc, stderr):
    return {
        "nll": {
            "wikitext2": {
                "difference": nll,
                "stderr": 0.02,
                "gap_closed": 0.33,
                "gap_closed_stderr": 0.04,
                "gap_closed_nats": 0.29,
                "gap_closed_nats_stderr": 0.03,
            }
        },
        "tasks": {task: {"difference": acc, "stderr": 2 * stderr} for task in TASKS},
        "mean_accuracy": {"difference": acc, "stderr": stderr},
        "mean_above_chance": {"difference": acc, "stderr": 1.5 * stderr},
    }


def with_seeds(results):
    """The learned variant at 50 % three times, and the mean."""
    at = next(i for i, v in enumerate(results["variants"]) if v["name"] == "leap@0.5")
    mean = results["variants"][at]
    members = [{**mean, "name": f"leap.seed{seed}@0.5", "seed": seed, "mean": "leap@0.5"} for seed in range(3)]
    alone = ("directory", "sparsity_per_layer", "mask_map", "samples")
    mean = {key: value for key, value in mean.items() if key not in alone}
    spread = {"nll": {"wikitext2": 0.005}, "tasks": dict.fromkeys(TASKS, 0.011), "mean_accuracy": 0.007}
    results["variants"][at : at + 1] = [mean | {"seeds": [0, 1, 2], "spread": spread}, *members]
    results["training"] = {member["name"]: training() for member in members}


def speed(sparsity):
    def token(milliseconds):
        parts = {"linears_ms": milliseconds / 2, "head_ms": milliseconds / 4, "rest_ms": milliseconds / 4}
        return {"tokens_per_second": 1e3 / milliseconds, "token_ms": milliseconds, **parts}

    gains = {"speedup": 1.25, "speedup_low": 1.2, "speedup_high": 1.3, "speedup_without_head": 1.4}
    matrix = {"layers": 3, "sparsity": sparsity, "dense_us": 50.0, "sparse_us": 31.25, "speedup": 1.6}
    return {
        "machine": "<CPU>, 1 threads",
        "matrices": [
            {"shape": [96, 32], "layer": "up", "dtype": dtype, "byte_limit": 1.73, "bandwidth": 0.8, **matrix}
            for dtype in ("bfloat16", "float32")
        ],
        "decode": {dtype: {"dense": token(5.0), "sparse": token(4.0), **gains} for dtype in ("bfloat16", "float32")},
    }


def training():
    steps = list(range(1, 61))
    return {
        "step": steps,
        "loss": [5 - s / 60 for s in steps],
        "lm_loss": [4 - s / 60 for s in steps],
        "density": [0.6 - s / 600 for s in steps],
        "expected_density": [0.6 - s / 600 for s in steps],
        "target_density": 0.5,
        "temperature": [4 - 3.9 * s / 60 for s in steps],
        "scale": [25.0 + s for s in steps],
        "lagrangian": [s / 60 for s in steps],
        "learning_rate": [1e-3] * 60,
        "masks": {"step": [0, 30, 60], "sampled": [5.0, 4.5, 4.1], "mean": [4.9, 4.4, 4.0], "hard": [6.0, 5.0, 4.2]},
        "tokens_per_second": 238.0,
    }


@pytest.fixture
def results():
    learned = variant("leap", 0.5, 30.4, 0.37, spread=0.1)
    learned |= {"speed": speed(0.5), "decode_tokens_per_second": 250.0}
    return {
        "recipe": "test",
        "model": {"name": "nano <script>alert(1)</script>", "parameters": 5_500_000, "prunable_parameters": 4_000_000},
        "created": "2026-11-22T11:40:00+00:00",
        "context_length": 256,
        "variants": [
            variant("dense", None, 24.6, 0.40),
            variant("wanda", 0.5, 44.0, 0.33),
            variant("admm", 0.5, 33.2, 0.36),
            learned | {"rival": "admm@0.5", "against": {"admm@0.5": difference(-0.088, 0.01, 0.006), "dense": {}}},
            variant("wanda", 0.6, 500.0, 0.28),
            variant("leap", 0.6, 60.0, 0.34, spread=0.1)
            | {"rival": "wanda@0.6", "against": {"wanda@0.6": difference(-2.12, 0.06, 0.006)}},
        ],
        "chance": dict.fromkeys(TASKS, 0.5),
        "clear_tasks": ["piqa"],
        "training": {"leap@0.5": training()},
        "calibration": {"train": {"documents": 9000, "tokens": 2_400_000, "rows": 2344, "source": "a & b"}},
        "stages": [
            {"name": "calibrate", "seconds": 31.0, "cached": True},
            {"name": "learn", "seconds": 5680.0, "cached": False},
        ],
        "environment": {"torch": "2.13.0"},
        "config": {"learn": {"steps": 60}},
        "warnings": ["magnitudes have <ties>"],
        "tracking": {"uri": "http://tracker:5000", "run_id": "ac76", "ui_command": "mlflow ui"},
    }


class Checker(HTMLParser):
    """Fails on tags that do not nest; collects texts, tags and what they refer to."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags, self.ids, self.references = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data")]
        self.references += [url for _, value in attrs for url in re.findall(r"url\(([^)]*)\)", value or "")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def headings(self):
        return [text for text in self.text if text in SECTIONS]


def page_of(results):
    return render_page(results, make_figures(results))


def test_the_page_is_whole_and_needs_nothing_else(results):
    page = page_of(results)
    checked = Checker(page)
    assert checked.headings() == SECTIONS
    assert checked.tags.count("svg") == 13
    drawn = [reference for reference in checked.references if reference.startswith("data:image/png;base64,")]
    assert len(drawn) == 5, "the masks"
    inside = [reference for reference in checked.references if reference not in drawn]
    assert all(reference.startswith("#") for reference in inside)
    assert {reference[1:] for reference in inside} <= set(checked.ids)
    assert len(checked.ids) == len(set(checked.ids))
    assert re.findall(r"https?://\S+", page) == ["http://tracker:5000</code></dd>"], "only as text"
    assert not {"script", "link", "img", "iframe"} & set(checked.tags)
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_text_is_escaped(results):
    page = page_of(results)
    assert "<script>" not in page
    assert "nano &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "magnitudes have &lt;ties&gt;" in page
    assert "a &amp; b" in page


def test_figures_take_their_colours_and_font_from_the_page(results):
    figure = make_figures(results)["layers/leap@0.5"]
    svg = inline_svg(figure, "x")
    assert "fill: var(--accent)" in svg
    assert "var(--font)" in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert "<title>layer 2, mlp.up_proj: 60.0\u00a0%</title>" in svg


def test_speed_says_where_the_time_of_a_token_goes_and_what_the_bytes_allow(results):
    page = page_of(results)
    text = " ".join("".join(Checker(page).text).split()).replace("\u00a0", " ")
    assert "1.25 (1.20 to 1.30)" in text
    assert "limit by bytes" in text
    assert "leap@0.5, 96 × 32, 50.0 %: 1.60 ×" in text
    assert "gain no speed from its zeros" in text[text.index("leap.load_sparse") :]
    assert "&lt;CPU&gt;, 1 threads" in page
    assert result_rows(results)[3]["decode_tokens_per_second"] == 250.0


def test_figures(results):
    assert sorted(make_figures(results)) == [
        "accuracy",
        "layers/leap@0.5",
        "layers/leap@0.6",
        *(f"masks/{name}" for name in ("admm@0.5", "leap@0.5", "leap@0.6", "wanda@0.5", "wanda@0.6")),
        "pareto",
        "perplexity",
        "speed",
        "stages",
        "training/leap@0.5",
    ]


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["training"], ["Learning the mask"]),
        (["calibration", "stages"], ["Calibration data", "Time"]),
        (["variants"], ["Results", "Speed", "Where the zeros are", "The masks", "Generated text"]),
        (["environment", "config", "warnings", "model", "created", "recipe"], ["Provenance"]),
        (
            ["variants", "training", "tracking"],
            [
                "Results",
                "Speed",
                "Where the zeros are",
                "The masks",
                "Generated text",
                "Learning the mask",
                "Artifacts and records",
            ],
        ),
    ],
)
def test_sections_may_be_missing(results, missing, gone):
    for key in missing:
        del results[key]
    assert Checker(page_of(results)).headings() == [heading for heading in SECTIONS if heading not in gone]
    print_report(results, Console(file=io.StringIO(), width=80))


def test_next_to_nothing():
    Checker(page_of({}))
    lone = {"variants": [variant("wanda", 0.5, 44.0, 0.3)]}
    for key in ("tasks", "mean_accuracy"):
        del lone["variants"][0][key]
    Checker(page_of(lone))
    assert headline(lone)[1] == "At 50\u00a0% sparsity wanda reaches perplexity 44.00 on wikitext2."
    Checker(page_of({"variants": [{"name": "dense", "target_sparsity": None}]}))


def test_errors_may_be_unknown(results):
    class Version(str):
        """Like torch's."""

    for row in results["variants"]:
        row["perplexity"]["wikitext2"]["stderr_nll"] = row["mean_accuracy"]["stderr"] = None
        row["tasks"]["piqa"]["acc_stderr"] = None
    results["environment"]["torch"] = Version("2.13.0+cpu")
    assert "torch: 2.13.0+cpu" in page_of(results)


def test_a_diverged_run_is_still_reported(results):
    results["training"]["leap@0.5"]["loss"][30:] = [math.nan] * 30
    results["variants"][3]["perplexity"]["wikitext2"]["perplexity"] = math.inf
    page = page_of(results)
    Checker(page)
    assert "∞" in page
    assert "wanda" in headline(results)[1] or "admm" in headline(results)[1]


def test_headline(results):
    done, half, sixty = (line.replace("\u00a0", " ") for line in headline(results))
    assert done.endswith("was pruned to 50 % and 60 % sparsity of its 4.0 M prunable weights, by wanda, admm and leap.")
    assert half == (
        "At 50 % sparsity leap reaches perplexity 30.40 on wikitext2 (dense 24.60), 8.4 % below the best layer-wise "
        "method, admm (weights updated too), at 33.20, which is 33 % of its gap to the dense model (29 % in nats); "
        "mean accuracy 42.0 % against 41.0 % for admm, "
        "a difference within two standard errors (+1.0 ± 0.6 points, paired)."
    )
    assert sixty.endswith(
        "88.0 % below the best layer-wise method, wanda, at 500.0, which is 33 % of its gap to the dense model "
        "(29 % in nats); mean accuracy 39.0 % against 33.0 % for wanda, "
        "a difference of more than two standard errors (+6.0 ± 0.6 points, paired)."
    )


def test_a_learned_mask_that_lost_is_said_to_be_worse(results):
    results["variants"][3]["perplexity"]["wikitext2"]["perplexity"] = 36.0
    assert "8.4\u00a0% above the best layer-wise method" in headline(results)[1].replace(" %", "\u00a0%")


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_table_fits(results, width):
    out = io.StringIO()
    print_report(results, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("variant"))
    rows = [line for line in lines[start : start + 10] if line.strip()]
    assert len(rows) == 7
    assert all(len(line) <= width for line in rows)
    assert all("…" not in line for line in rows)
    assert "30.40 ± 0.30" in next(line for line in rows if line.startswith("leap@0.5"))
    assert ("piqa" in rows[0]) == (width == 160)
    assert "gain no speed" in " ".join(" ".join(lines).split())


def test_the_mean_above_chance_says_what_it_is_over(results):
    page = page_of(results)
    assert "of 1 above chance" in page
    assert "mean over piqa, where the dense model is more than two standard errors above guessing" in page
    results["clear_tasks"] = list(TASKS)
    assert "above chance" not in page_of(results)


@pytest.mark.parametrize("width", [80, 200])
def test_differences_stand_in_a_table_of_their_own(results, width):
    out = io.StringIO()
    print_report(results, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("difference of  "))
    row = next(line for line in lines[start:] if line.startswith("leap@0.5"))
    assert "admm@0.5" in row
    assert "−0.088 ± 0.020" in row
    assert "33 ± 4 %" in row
    assert ("+1.0 ± 1.2" in row) == (width == 200), "single tasks where there is room"
    assert all(len(line) <= width for line in lines[start : start + 3])
    page = page_of(results)
    assert '−0.088<span class="error"> ± 0.020</span>' in page


def test_several_seeds_are_one_row_of_the_table_and_three_of_the_rest(results):
    with_seeds(results)
    out = io.StringIO()
    print_report(results, Console(file=out, width=200))
    text = out.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("leap@0.5 (3 seeds)"))
    assert "30.40 ± 0.15" in row
    assert "42.0 ± 0.7" in row
    assert not [line for line in text.splitlines() if line.startswith("leap.seed1@0.5 ")]
    assert "mean over that many seeds" in text
    assert "leap (3 seeds)" in headline(results)[1]
    names = set(make_figures(results))
    assert {f"layers/leap.seed{seed}@0.5" for seed in range(3)} <= names
    assert "layers/leap@0.5" not in names
    Checker(page_of(results))
    assert [row["name"] for row in result_rows(results)].count("leap@0.5") == 1
    assert "leap.seed2@0.5" in [row["name"] for row in result_rows(results)]


def test_rows_for_machines(results):
    row = result_rows(results)[3]
    assert row["name"] == "leap@0.5"
    assert row["perplexity/wikitext2"] == 30.4
    assert row["acc_stderr/piqa"] == 0.03
    assert json.loads(json.dumps(row)) == row


def test_reporting_leaves_the_results_alone(results, tmp_path):
    before = copy.deepcopy(results)
    path = write_page(results, make_figures(results), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(path.parent.iterdir()) == [path]
    assert results == before


def test_generated_text_is_escaped_and_side_by_side(results):
    page = page_of(results)
    assert "Once &lt;upon" in page
    assert page.index("a time dense") < page.index("a time leap@0.5") < page.index("a time wanda@0.5")


def test_experts_are_averaged():
    sparsity = {"model.layers.10.mlp.experts.0.up_proj": 0.4, "model.layers.10.mlp.experts.1.up_proj": 0.6}
    assert layer_table(sparsity) == {"mlp.experts.*.up_proj": {10: 0.5}}


def test_numbers():
    plain = [
        perplexity(24.6),
        perplexity(24.6, 0.01),
        perplexity(4321.7),
        perplexity(3e7),
        perplexity(math.inf),
        perplexity(None),
        percent(0.5),
        duration(4.2),
        duration(59.7),
        duration(133),
        duration(5680),
        count(134_515_008),
        count(4096),
        count(23_456),
    ]
    assert [text.replace("\u00a0", " ") for text in plain] == [
        "24.60",
        "24.60 ± 0.25",
        "4 322",
        "3.0e+07",
        "∞",
        "–",
        "50.0 %",
        "4.2 s",
        "1 min 0 s",
        "2 min 13 s",
        "1 h 34 min",
        "134.5 M",
        "4 096",
        "23.5 k",
    ]
