import pytest

from vreflection_hub_card.evaluation.benchmarks import Item
from vreflection_hub_card.evaluation.prompts import lettered, mmvp_question, prompt, with_options


def test_the_instruction_follows_the_question():
    item = Item("1", "What is it?", (), "A", ())
    assert prompt(item.question) == "What is it?\nAnswer with the option's letter from the given choices directly."


def test_an_unknown_protocol():
    with pytest.raises(ValueError, match="Unknown protocol 'ours'; choose one of authors"):
        prompt("What is it?", "ours")


def test_mmvp_labels_are_rewritten_on_their_line():
    assert mmvp_question("Open?", "(a) Open (b) Closed") == "Open?\nOptions:\nA. Open B. Closed"


def test_options_with_letters():
    assert with_options("Which?", lettered(["red", "blue", "both"])) == "Which?\nOptions:\nA. red\nB. blue\nC. both"
