from vreflection_hub_card.evaluation.prompts import lettered, mmvp_question, with_options


def test_mmvp_labels_are_rewritten_on_their_line():
    assert mmvp_question("Open?", "(a) Open (b) Closed") == "Open?\nOptions:\nA. Open B. Closed"


def test_options_with_letters():
    assert with_options("Which?", lettered(["red", "blue", "both"])) == "Which?\nOptions:\nA. red\nB. blue\nC. both"
