"""Renders what pages of `docs` show of the committed result files: `python -m experiments.results_page`.

A page's tables stand between markers, `<!-- NAME -->` and `<!-- /NAME -->`; all else is written by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from vreflection_hub_card.evaluation.report import glyphsearch_table, thresholds_report

from .benchmark.benchmark_tables import decoding_tables, training_tables
from .benchmark.operators import RESULT as OPERATORS_RESULT
from .benchmark.operators import operators_table
from .benchmark.sizes import RESULT as SIZES_RESULT
from .benchmark.sizes import sizes_table
from .chains.table import TABLES, read_results, time_table
from .chains.train import RESULTS as CHAINS_RESULTS
from .reward.reward_table import reward_table
from .reward.without_boxes import RESULTS as REWARD_RESULTS
from .serving.served_tables import profile_table, soak_report


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
LATENTS_PAGE = ROOT / "docs" / "latents.md"
DECODING_PAGE = ROOT / "docs" / "decoding.md"
SERVING_PAGE = ROOT / "docs" / "serving.md"
TRAINING_PAGE = ROOT / "docs" / "training.md"
EMBEDDED_RESULTS = ROOT / "hub_card" / "results"
BENCHMARK_RESULTS = ROOT / "experiments" / "benchmark" / "results"
THRESHOLDS_RESULT = ROOT / "experiments" / "embedded_checkpoint" / "results" / "thresholds_chains.json"
MIXED_THRESHOLDS_RESULT = CHAINS_RESULTS / "thresholds" / "path_then_half.json"
QWEN3_VL_RESULT = ROOT / "experiments" / "second_backbone" / "results" / "tiny_qwen3_vl.json"
SERVING_RESULTS = ROOT / "experiments" / "serving" / "results"
STUDY_RESULTS = ROOT / "experiments" / "study" / "results" / "quick"
CHAINS_CPU_RESULTS = CHAINS_RESULTS / "cpu"
# Of arms that share a shorter schedule.
CPU_TABLES = tuple(
    f"chains {what}" for what in ("missing", "kinship", "other", "replaced", "looks", "without reflecting")
)
Renderers = dict[str, tuple[Callable[..., str], Path]]
RENDERERS: Renderers = {
    "glyphsearch default": (glyphsearch_table, EMBEDDED_RESULTS / "vreflection_tiny.json"),
    "glyphsearch mixed": (glyphsearch_table, EMBEDDED_RESULTS / "vreflection_tiny_mixed.json"),
    "study": (str.strip, STUDY_RESULTS / "tables.md"),
    "glyphsearch chains": (glyphsearch_table, EMBEDDED_RESULTS / "vreflection_tiny_chains.json"),
    "glyphsearch qwen3_vl": (glyphsearch_table, QWEN3_VL_RESULT),
    "sizes": (sizes_table, SIZES_RESULT),
    "operators": (operators_table, OPERATORS_RESULT),
    "training small": (training_tables, BENCHMARK_RESULTS / "training_small.json"),
    "decoding 7b": (decoding_tables, BENCHMARK_RESULTS / "decoding_7b_cpu.json"),
    "decoding 3b dac": (decoding_tables, BENCHMARK_RESULTS / "decoding_3b_dac_cpu.json"),
    "decoding small": (decoding_tables, BENCHMARK_RESULTS / "decoding_small.json"),
    "decoding tiny": (decoding_tables, BENCHMARK_RESULTS / "decoding_tiny.json"),
    "decoding embedded": (decoding_tables, BENCHMARK_RESULTS / "decoding_vreflection_tiny.json"),
}
LATENTS: Renderers = {
    **{name: (render, CHAINS_RESULTS) for name, render in TABLES.items()},
    **{f"cpu {name}": (TABLES[name], CHAINS_CPU_RESULTS) for name in CPU_TABLES},
    "chains time": (time_table, CHAINS_RESULTS / "answer_time.json"),
}
DECODING: Renderers = {
    "thresholds": (thresholds_report, THRESHOLDS_RESULT),
    "thresholds of mixed rows": (thresholds_report, MIXED_THRESHOLDS_RESULT),
}
SERVING: Renderers = {
    "soak": (soak_report, SERVING_RESULTS / "vllm_soak.json"),
    "profile": (profile_table, SERVING_RESULTS / "vllm_profile.json"),
}
TRAINING: Renderers = {
    "reward": (reward_table, REWARD_RESULTS),
    "reward after forgetting": (reward_table, REWARD_RESULTS / "after_forgetting"),
    "reward from an earlier start": (reward_table, REWARD_RESULTS / "earlier_start"),
}
PAGES = {
    PAGE: RENDERERS,
    LATENTS_PAGE: LATENTS,
    DECODING_PAGE: DECODING,
    SERVING_PAGE: SERVING,
    TRAINING_PAGE: TRAINING,
}


def render_page(page: str, renderers: Renderers) -> str:
    """The page with all tables rendered anew, each from a result file, a Markdown file, or a folder of an arm's results each.

    Raises:
        ValueError: A page without one of the markers, or a result without all figures.
    """
    for name, (render, path) in renderers.items():
        page = fill_block(page, name, render(read(path)))
    return page


def read(path: Path) -> dict | list[dict] | str:
    """What a table is rendered from."""
    if REWARD_RESULTS in (path, *path.parents):
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))]
    if path.is_dir():
        return read_results(path)
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def fill_block(document: str, name: str, text: str) -> str:
    """The document with the text between the markers of that name.

    Raises:
        ValueError: A document without the markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in document or end not in document:
        raise ValueError(f"The document has no {begin} and {end} to put the table between.")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", document, flags=re.DOTALL)


if __name__ == "__main__":
    for path, renderers in PAGES.items():
        path.write_text(render_page(path.read_text(encoding="utf-8"), renderers), encoding="utf-8")
