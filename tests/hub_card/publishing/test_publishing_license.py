"""The license of what is published follows from the base model's, as the Hub knows it."""

import pytest
from hub_server import File
from huggingface_hub import HfApi

from vreflection_hub_card.card import TRAINING_FACTS, check_card, write_card
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.publishing.license import check_license


RESEARCH = {"license": "other", "license_name": "research", "license_link": "https://example.org/LICENSE"}
BASE = "big/base"


@pytest.fixture
def check(hub, checkpoint, capsys):
    """Checks a card over a base model of some license; returns the card afterwards, and what was printed."""

    def run(theirs, own):
        if theirs is not None:
            front = "".join(f"{name}: {value}\n" for name, value in theirs.items())
            hub.add_repo(BASE).commit("main", {"README.md": File(f"---\n{front}tags: [x]\n---\n".encode(), False)})
        (checkpoint / TRAINING_FACTS).unlink()
        write_card(checkpoint, "ann/tiny", base_model=BASE, datasets=["ann/rows"], **own)
        check_license(checkpoint, HfApi())
        return check_card(checkpoint).data, capsys.readouterr().out

    return run


def fields(data):
    return {name: value for name in RESEARCH if (value := data.get(name)) is not None}


@pytest.mark.parametrize("theirs", [{"license": "apache-2.0"}, RESEARCH])
def test_a_card_without_a_license_gets_the_base_models(check, theirs):
    data, printed = check(theirs, {})
    assert fields(data) == theirs and data.base_model == BASE
    assert printed.count("\n") == 1 and theirs.get("license_name", "apache-2.0") in printed and BASE in printed


@pytest.mark.parametrize(
    "theirs, own",
    [({"license": "apache-2.0"}, {"license": "mit"}), (RESEARCH, RESEARCH), (None, {"license": "mit"}), ({}, {"license": "mit"})],
)  # fmt: skip
def test_a_license_that_fits_stays(check, theirs, own):
    data, printed = check(theirs, own)
    assert fields(data) == own and not printed


@pytest.mark.parametrize(
    "theirs, own, message",
    [
        (RESEARCH, {"license": "apache-2.0"}, "under the license research, .* can't be under apache-2.0"),
        ({"license": "cc-by-nc-4.0"}, {"license": "mit"}, "can't be under mit"),
        (None, {}, "names no license, and neither does its base model"),
        ({}, {}, "names no license, and neither does its base model"),
    ],
)
def test_a_license_that_does_not_fit_is_refused(check, theirs, own, message):
    with pytest.raises(InputError, match=message):
        check(theirs, own)


def test_of_several_base_models_the_one_that_forbids_most_counts(check, hub, checkpoint):
    hub.add_repo("big/free").commit("main", {"README.md": File(b"---\nlicense: mit\n---\n", False)})
    check(RESEARCH, RESEARCH)
    card = (checkpoint / "README.md").read_text()
    card = card.replace(f"base_model: {BASE}", f"base_model:\n- big/free\n- {BASE}")
    (checkpoint / "README.md").write_text(card)
    check_license(checkpoint, HfApi())
    (checkpoint / "README.md").write_text(
        card.replace("license: other", "license: mit").replace("license_name: research\n", "")
    )
    with pytest.raises(InputError, match="big/base is under the license research"):
        check_license(checkpoint, HfApi())


def test_front_matter_that_the_hub_refuses(hub, checkpoint):
    hub.fail("validate-yaml", 400)
    with pytest.raises(InputError, match="README.md: .*told to fail"):
        check_license(checkpoint, HfApi())
