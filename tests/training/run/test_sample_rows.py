"""A run draws the same rows each time, whole, whatever the order in which it trains on them."""

import pytest
import torch
from datasets import Dataset

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.inference.encoding import encode_prompts
from vreflection_training.run import sample_pictures


@pytest.fixture
def drawn(monkeypatch):
    """What stands above each picture, by its file's name, and its arrays."""
    figures = {}

    def keep(figure, path):
        lines = " ".join(figure.get_suptitle().split())
        figures[path.name] = lines, [axes.images[0].get_array() for axes in figure.axes if axes.images][0]

    monkeypatch.setattr(sample_pictures.drawing, "save_figure", keep)
    return figures


def test_the_same_rows_with_question_and_answers(make_trainer, drawn, rows, model, processor):
    """Also where a row doesn't reflect, and several are packed; the shuffled and resumed run is below."""
    plain = {**rows[0], "id": "plain", "messages": [dict(message) for message in rows[0]["messages"]]}
    plain["messages"][-1]["content"] = [
        part for part in plain["messages"][-1]["content"] if part["type"] != "reflection"
    ]
    given = Dataset.from_list([plain, *rows])
    make_trainer(given, stage="2", max_steps=2, sample_every=1, sample_packing=True, learning_rate=0.0).train()
    assert sorted(drawn) == [f"step-{step}-row-{row}.png" for step in (1, 2) for row in (1, 2)]
    for number, row in enumerate([rows[0], rows[1]], 1):  # the first that reflect
        asked, answered = (
            next(part["text"] for part in message["content"] if part["type"] == "text") for message in row["messages"]
        )
        user = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": asked}]
        inputs = encode_prompts(processor, [{"role": "user", "content": user}], "cpu")
        tokens = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        own = " ".join(processor.decode(tokens[0], skip_special_tokens=True).split()) or "(an empty answer)"
        for step in (1, 2):
            said, picture = drawn[f"step-{step}-row-{number}.png"]
            assert f"step {step}: {row['id']} Question: {asked} Expected: {answered} Answer: {own[:30]}" in said
            assert (picture == drawn[f"step-1-row-{number}.png"][1]).all()


@pytest.mark.slow
def test_drawing_changes_no_weight(make_trainer, drawn, model):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for every in (0, 1):
        model.load_state_dict(start)
        make_trainer(stage="1", max_steps=3, sample_every=every).train()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert len(drawn) == 6 and all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_rows(make_trainer, drawn, tmp_path):
    rows = glyphsearch_dataset("train", 6)
    options = {"stage": "2", "sample_every": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    make_trainer(rows, max_steps=1, train_sampling_strategy="random", **options).train()
    make_trainer(rows, max_steps=2, train_sampling_strategy="random", **options).train(resume_from_checkpoint=True)
    for row in (1, 2):
        first, second = (drawn[f"step-{step}-row-{row}.png"] for step in (1, 2))
        assert first[0].split(" Answer: ")[0].replace("step 1:", "step 2:") == second[0].split(" Answer: ")[0]
        assert (first[1] == second[1]).all()
