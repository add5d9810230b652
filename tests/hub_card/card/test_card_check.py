"""A card that isn't fit to be published is told by what it lacks."""

import pytest
import yaml

from vreflection_hub_card.card import TRAINING_FACTS, check_card, write_card, write_training_facts
from vreflection_hub_card.errors import InputError


@pytest.fixture
def published(folder, facts, results, write_result):
    """A folder whose card is complete."""
    write_training_facts(folder, facts)
    write_card(folder, "someone/model", [*results, write_result(folder)])
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_written_card_is_complete(published):
    assert check_card(published).data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_a_model_from_nothing_on_drawn_data_needs_neither_base_nor_data_set(folder):
    write_card(folder)
    assert check_card(folder).data.license == "apache-2.0"
    (folder / TRAINING_FACTS).unlink()
    with pytest.raises(InputError, match="has no base_model, base_model_relation, datasets$"):
        check_card(folder)


@pytest.mark.parametrize(
    "field",
    ["language", "library_name", "pipeline_tag", "base_model_relation", "datasets", "metrics", "tags"],
)
def test_a_missing_field_is_named(published, field):
    path = published / "README.md"
    _, front, text = path.read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    del data[field]
    path.write_text(f"---\n{yaml.safe_dump(data)}---\n{text}")
    with pytest.raises(InputError, match=rf"README.md: the front matter has no {field}$"):
        check_card(published)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("## Training", "## Training\n\n[More Information Needed]", r"the placeholder '\[More Information Needed\]'"),
        ("## Training", "## Training\n\nTODO", "the placeholder 'TODO'"),
        ("## Training", "## Training\n\n{{ training }}", "the placeholder '{{ training }}'"),
        ("base_model: Qwen/", "base_model: /home/me/Qwen/", "is no id on the Hub"),
        ("relation: finetune", "relation: merge", "base_model_relation is 'merge'"),
        ("value: 1.0", "value: perfect", "is no number"),
        ("  - task:", "  - tusk:", "front matter can't be read"),
        ("---\n", "", "has no .*base_model, .*license"),
    ],
)
def test_what_no_card_may_hold_is_named(published, old, new, message):
    edit(published / "README.md", old, new)
    with pytest.raises(InputError, match=message):
        check_card(published)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("value:", "worth:", r"\.eval_results/vstar.yaml can't be read"),
        ("id: craigwu/vstar_bench", "id: /data/vstar", "is no id on the Hub"),
        ("value: 0.", "value: much ", "vstar.yaml: the value is no number"),
        ("- dataset:", "- - dataset:", "can't be read"),
    ],
)
def test_results_that_the_hub_cannot_read_are_named(published, old, new, message):
    edit(published / ".eval_results" / "vstar.yaml", old, new)
    with pytest.raises(InputError, match=message):
        check_card(published)


def test_results_of_weights_that_were_replaced_are_noticed(published):
    weights = published / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="belong to other weights"):
        check_card(published)


def test_results_of_no_said_weights_are_noticed(published):
    edit(published / "README.md", "SHA-256", "SHA-1")
    with pytest.raises(InputError, match="doesn't say of which weights"):
        check_card(published)


def test_no_card_and_no_licence(folder, facts):
    with pytest.raises(InputError, match="there is no model card"):
        check_card(folder)
    write_training_facts(folder, facts | {"base_model": "someone/else"})
    write_card(folder)
    assert check_card(folder).data.license is None  # publishing takes the base model's
    write_card(folder, license="mit")
    edit(folder / "README.md", "license: mit\n", "license: other\n")
    with pytest.raises(InputError, match="no license_name, license_link"):
        check_card(folder)
