"""Renders `docs/results.md` from the committed result files: `python -m experiments.results_page`.

The page's tables stand between markers, `<!-- NAME -->` and `<!-- /NAME -->`; all else is written by hand.
"""

import json
import re
from pathlib import Path

from vreflection_hub_card.evaluation.report import glyphsearch_table

from .benchmark.benchmark_tables import decoding_tables, training_tables


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
EMBEDDED_RESULTS = ROOT / "hub_card" / "results"
BENCHMARK_RESULTS = ROOT / "experiments" / "benchmark" / "results"
STUDY_RESULTS = ROOT / "experiments" / "study" / "results" / "quick"
RENDERERS = {
    "glyphsearch default": (glyphsearch_table, EMBEDDED_RESULTS / "vreflection_tiny.json"),
    "glyphsearch mixed": (glyphsearch_table, EMBEDDED_RESULTS / "vreflection_tiny_mixed.json"),
    "training small": (training_tables, BENCHMARK_RESULTS / "training_small.json"),
    "decoding 7b": (decoding_tables, BENCHMARK_RESULTS / "decoding_7b_cpu.json"),
    "decoding 3b dac": (decoding_tables, BENCHMARK_RESULTS / "decoding_3b_dac_cpu.json"),
    "decoding small": (decoding_tables, BENCHMARK_RESULTS / "decoding_small.json"),
    "decoding tiny": (decoding_tables, BENCHMARK_RESULTS / "decoding_tiny.json"),
    "decoding embedded": (decoding_tables, BENCHMARK_RESULTS / "decoding_vreflection_tiny.json"),
}


def render_page(page: str) -> str:
    """The page with all tables rendered anew.

    Raises:
        ValueError: A page without one of the markers, or a result without all figures.
    """
    for name, (render, path) in RENDERERS.items():
        page = fill_block(page, name, render(json.loads(path.read_text())))
    return fill_block(page, "study", (STUDY_RESULTS / "tables.md").read_text().strip())


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
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
