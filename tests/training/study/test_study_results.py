"""The committed results are told as they are: README, card and summary are rendered from them."""

from pathlib import Path

import pytest

from vreflection_hub_card.evaluation.report import fill_block
from vreflection_training.study.run import StudyRun
from vreflection_training.study.summary import main_tables, read_findings, read_results, summarise
from vreflection_training.study.table import read_study


ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
OUTPUT = ROOT / "hub_card" / "study" / "quick"


@pytest.fixture(scope="module")
def study():
    return read_study()


def test_the_documents_quote_the_committed_results(study, tmp_path):
    form, results = study.forms["quick"], read_results(study, OUTPUT)
    left = StudyRun(study, form, tmp_path, OUTPUT).missing()
    assert (OUTPUT / "summary.md").read_text() == summarise(study, form, results, left, read_findings(OUTPUT))
    tables = main_tables(study, results)
    assert (OUTPUT / "tables.md").read_text() == tables + "\n"
    assert fill_block(README, "study", tables) == README
    assert tables in (ROOT / "hub_card" / "vreflection_tiny" / "README.md").read_text()


def test_all_arms_started_from_one_base(study):
    assert len({result["base"] for result in read_results(study, OUTPUT).values()}) == 1


def test_the_main_arms_have_all_their_seeds(study):
    missing = StudyRun(study, study.forms["quick"], OUTPUT, OUTPUT).missing()
    assert not {name for name, _ in missing} & {"base", "sft", "stage1", "two_stage"}
