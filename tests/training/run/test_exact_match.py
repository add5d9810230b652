"""Three numbers tell whether answers need their latents: with the model's own, with the teacher's, with zeros."""

import copy
import json

import pytest
import torch
from datasets import IterableDataset
from run_helpers import Rows

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card import read_training_facts
from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_hub_card.inference.encoding import encode_prompts
from vreflection_training import VReflectionDataCollator
from vreflection_training.cli import main_train
from vreflection_training.collator import NON_MODEL_KEYS
from vreflection_training.run.exact_match import batches, count_exact_matches, exact_match_ways, share_of_rank
from vreflection_training.run.model_card import last_exact_match


THREE = ("exact_match", "exact_match_teacher", "exact_match_zeros")


@pytest.fixture
def talker(checkpoint, processor):
    """Random weights, whose words depend on the latents; most words end the answer, and each begins with a reflection."""
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():  # layers so strong that what is said depends on what is fed
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter *= 1.4
    texts = {token: processor.decode([token]) for token in range(model.config.text_config.vocab_size)}
    words = [token for token, text in texts.items() if text.strip().isalpha() and text.isascii()]
    decoding = model.generation_config
    decoding.suppress_tokens = sorted(set(texts) - set(words) - {model.config.latent_start_token_id})
    decoding.eos_token_id = [token for number, token in enumerate(words) if number % 4]
    decoding.reflect, decoding.latent_feedback = True, "dac"
    return model.eval()


@pytest.fixture
def questions():
    """Scenes; one with two reflections, one without any, and one with an answer to an earlier question."""
    rows = [copy.deepcopy(dict(row)) for row in glyphsearch_dataset("validation", 8)]
    for row in rows:
        row["images"] = list(row["images"])
    twice = rows[2]["messages"][-1]["content"]
    twice.insert(0, dict(twice[0]))
    rows[3]["messages"][-1]["content"] = rows[3]["messages"][-1]["content"][1:]
    asked = [{"type": "text", "text": "Which glyph is on the red cross?"}]
    rows[4]["messages"][1:1] = [
        {"role": "assistant", "content": [{"type": "text", "text": "Q"}]},
        {"role": "user", "content": asked},
    ]
    return rows


def reflections(row):
    return sum(part["type"] == "reflection" for part in row["messages"][-1]["content"])


@torch.no_grad()
def answer(model, processor, row, **options):
    """The answer to a row's last question, asked alone."""
    images = iter(row["images"])
    messages = [
        {
            **message,
            "content": [
                {**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in row["messages"][:-1]
    ]
    inputs = encode_prompts(processor, [messages], "cpu")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40, **options)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


@pytest.mark.slow
def test_against_rows_asked_one_by_one(talker, processor, questions):
    said = []
    for row in questions:
        latents = {}
        if reflections(row):
            batch = VReflectionDataCollator(processor, talker.config)([row])
            batch = {name: value for name, value in batch.items() if name not in NON_MODEL_KEYS}
            with torch.no_grad():
                teacher = talker(**batch, latent_inputs="bcm").teacher_latents
            latents = {"latents": teacher.flatten(0, 1)[None]}
        zeros = {"latents": torch.zeros(1, 40, talker.config.text_config.hidden_size)}
        ways = zip(THREE, ({}, latents, zeros))
        said.append({way: answer(talker, processor, row, **options) for way, options in ways})
    # What is asked for are answers of all ways: four, two and one, and one of nobody's.
    for row, texts, way in zip(questions, said, [*THREE[:1] * 4, *THREE[1:2] * 2, THREE[2], None]):
        row["messages"][-1]["content"][-1]["text"] = texts[way] if way else "nothing like it"
    expected = {
        way: sum(texts[way] == row["messages"][-1]["content"][-1]["text"] for row, texts in zip(questions, said))
        for way in THREE
    }
    assert len(set(expected.values())) == 3 and 8 not in expected.values(), said  # or the test tells nothing
    collator = VReflectionDataCollator(processor, talker.config, slot_ce=True)
    ways = exact_match_ways(talker, True)
    assert set(ways) == set(THREE)
    for batch_size in (1, 3, 8):
        options = {"batch_size": batch_size, "device": torch.device("cpu")}
        right, count = count_exact_matches(talker, collator, questions, ways, **options)
        assert right == expected and count == 8


def test_a_batch_has_equally_many_reflections_and_each_row_comes_once(questions):
    found = list(batches(questions, 3, True))
    assert sorted(row["id"] for _, batch in found for row in batch) == sorted(row["id"] for row in questions)
    for count, batch in found:
        assert len(batch) <= 3 and {reflections(row) for row in batch} == {count}
    assert [count for count, _ in batches(questions, 8, False)] == [0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_each_row_is_asked_on_one_rank(ranks):
    shares = [list(share_of_rank(range(10), rank, ranks)) for rank in range(ranks)]
    assert sorted(sum(shares, [])) == list(range(10)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_bad_rows_are_left_out_where_the_run_leaves_them_out(talker, processor, questions):
    bad = {"id": "lost", "images": ["nowhere.png"], "messages": questions[0]["messages"]}
    options = {"batch_size": 2, "device": torch.device("cpu")}
    collator = VReflectionDataCollator(processor, talker.config, slot_ce=True, on_bad_row="skip")
    for rows, asked in (([bad, questions[5], bad, bad], 1), ([bad], 0)):
        assert count_exact_matches(talker, collator, rows, ("exact_match",), **options)[1] == asked
    collator.on_bad_row = "error"
    with pytest.raises(ValueError, match="nowhere.png"):
        count_exact_matches(talker, collator, [bad], ("exact_match",), **options)


@pytest.mark.parametrize("stage, names", [("path", THREE), ("2", THREE), ("sft", THREE[:1])])
def test_an_evaluation_logs_them_and_the_card_says_them(make_trainer, model, rows, tmp_path, stage, names):
    options = {"max_steps": 1, "predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(stage=stage, eval_dataset=rows.select(range(2)), **options)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert {name for name in log if "exact_match" in name} == {f"eval_{name}" for name in names}
    trainer.save_model()
    (run,) = read_training_facts(tmp_path / "run")["runs"]
    assert run["exact_match"] == {**{f"eval_{name}": log[f"eval_{name}"] for name in names}, "step": 1}
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"`eval_exact_match` {log['eval_exact_match']:.1%}" in card and "(after step 1)" in card


def test_rows_of_a_stream_are_asked_too(make_trainer, talker, questions):
    rows = Rows(questions)
    options = {"trained": talker, "stage": "path", "predict_with_generate": True, "per_device_eval_batch_size": 3}
    stored = make_trainer(**options).evaluate(rows)
    stream = IterableDataset.from_generator(lambda: iter(questions))
    streamed = make_trainer(stream, **options).evaluate(stream)
    names = [f"eval_{name}" for name in THREE]
    assert [stored[name] for name in names] == [streamed[name] for name in names]


def test_without_a_teacher_its_number_is_missing(make_trainer, checkpoint, rows):
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, has_bcm=False)
    options = {"stage": "2", "latent_inputs": "hidden", "allow_untrained_bcm": True, "predict_with_generate": True}
    metrics = make_trainer(trained=model, **options).evaluate(rows.select(range(2)))
    assert {"eval_exact_match", "eval_exact_match_zeros"} == {name for name in metrics if "exact_match" in name}


def test_without_the_flag_nothing_is_generated(make_trainer, rows, monkeypatch):
    monkeypatch.setattr(VReflectionForConditionalGeneration, "generate", None)
    metrics = make_trainer(stage="path").evaluate(rows.select(range(2)))
    assert not [name for name in metrics if "exact_match" in name]


def test_shared_out_weights_are_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("vreflection_training.sft_trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="`predict_with_generate` decodes on each rank by itself"):
        make_trainer(stage="sft", predict_with_generate=True)


def test_the_last_evaluation_is_what_counts():
    history = [
        {"eval_a_exact_match": 0.1, "eval_c_exact_match": 0.4, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_a_exact_match": 0.2, "eval_loss": 3.0, "step": 2},
        {"eval_b_exact_match": 0.3, "step": 2},
        {"loss": 1.0, "step": 3},
    ]
    assert last_exact_match(history) == {"eval_a_exact_match": 0.2, "eval_b_exact_match": 0.3, "step": 2}
    assert last_exact_match(history[1:2]) == {}


def test_a_recipe_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    held_out = json.dumps([{"format": "glyphsearch", "split": "validation", "count": 2}])
    short = (
        "--max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --use_cpu --report_to none".split()
    )
    start = ["path_tiny", "--model_name_or_path", str(EMBEDDED), *short]
    assert main_train([*start, "--eval_steps", "2", "--eval_datasets", held_out]) == 0
    (run,) = read_training_facts(tmp_path / "outputs" / "path_tiny")["runs"][-1:]
    assert set(run["exact_match"]) == {f"eval_{name}" for name in THREE} | {"step"}
    assert (
        json.loads((tmp_path / "outputs" / "path_tiny" / "generation_config.json").read_text())["latent_feedback"]
        == "dac"
    )
    assert main_train([*start, "--eval_strategy", "no"]) == 2
    assert "set `eval_strategy` and `eval_datasets`, or neither" in capsys.readouterr().err
    assert main_train(["tiny_base", *short, "--eval_strategy", "steps"]) == 2
    assert "got 'steps' and None" in capsys.readouterr().err
