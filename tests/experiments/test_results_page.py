"""The committed results are told as they are: the page and the summary are rendered from them."""

import json
import re

import pytest

from experiments.results_page import PAGE, PAGES, RENDERERS, ROOT, STUDY_RESULTS, fill_block, render_page
from experiments.study.ablation_tables import read_findings, read_results, summarise
from experiments.study.ablations import StudyRun
from experiments.study.arms import read_study
from vreflection_hub_card.evaluation.report import percent


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_shows_the_committed_results(path):
    page = path.read_text()
    assert render_page(page, PAGES[path]) == page
    assert set(re.findall("<!-- (?!/)(.+?) -->", page)) == set(PAGES[path])


def test_the_page_quotes_the_base_that_did_not_learn():
    path = "experiments/embedded_checkpoint/results/tiny_base_amd.json"
    share = json.loads((ROOT / path).read_text())["tasks"]["glyphsearch"]["accuracy"]["overall"]["share"]
    assert f"[{percent(share)}](../{path})" in PAGE.read_text()


def test_every_result_file_is_on_the_page():
    files = {
        path for folder in ("benchmark", "study") for path in (ROOT / "experiments" / folder).rglob("results/*.json")
    }
    assert files == {path for _, path in RENDERERS.values() if path.parent.parent.name == "benchmark"}


@pytest.mark.parametrize(
    "path", [link for page in PAGES for link in re.findall(r"\]\((\.\./\S+)\)", page.read_text())]
)
def test_what_a_page_links_to_exists(path):
    assert (PAGE.parent / path).is_file()


def test_a_block_replaces_the_one_between_its_markers():
    assert fill_block("a\n<!-- x -->\nold <!-- /x -->\nb", "x", r"\1") == "a\n<!-- x -->\n\n\\1\n\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="no <!-- x -->"):
        fill_block("a", "x", "text")


@pytest.mark.slow
def test_the_studys_summary_shows_the_committed_results(tmp_path):
    study = read_study()
    form, results = study.forms["quick"], read_results(study, STUDY_RESULTS)
    left = StudyRun(study, form, tmp_path, STUDY_RESULTS).missing()
    assert (STUDY_RESULTS / "summary.md").read_text() == summarise(
        study, form, results, left, read_findings(STUDY_RESULTS)
    )
    tables = (STUDY_RESULTS / "tables.md").read_text().strip()
    assert set(tables.splitlines()) <= {*(STUDY_RESULTS / "summary.md").read_text().splitlines()}
    assert tables in (ROOT / "hub_card" / "vreflection_tiny" / "README.md").read_text()
    assert len({result["base"] for result in results.values()}) == 1
    assert left == []
