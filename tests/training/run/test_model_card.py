"""A run leaves a card of our template and the facts of its training, without a path of its machine."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card import TRAINING_FACTS, check_card, read_training_facts, write_card
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import main_train
from vreflection_training.recipe import parse
from vreflection_training.run.model_card import RunOrigin, public_source


ROOT = Path(__file__).parents[3]
SHORT = "--max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --use_cpu --logging_steps 1 --report_to none"


def load(folder) -> ModelCard:
    return ModelCard((Path(folder) / "README.md").read_text())


def facts_of(folder) -> dict:
    return json.loads((Path(folder) / TRAINING_FACTS).read_text())


def test_the_stages_of_a_recipe_end_in_a_card_that_tells_all_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_base", "tiny_stage1", "tiny_stage2"):
        assert main_train([name, *SHORT.split()]) == 0
    folder = tmp_path / "outputs" / "tiny_stage2"
    facts, card = facts_of(folder), load(folder)
    assert facts["from_scratch"] and facts["base_model"] is None
    assert [run["stage"] for run in facts["runs"]] == ["sft", "1", "2"]
    assert [run["started_from"] for run in facts["runs"]] == [None, "tiny_base", "tiny_stage1"]
    assert [run["steps"] for run in facts["runs"]] == [2, 2, 2] and all(run["tokens"] > 0 for run in facts["runs"])
    assert facts["runs"][1]["losses"] == {"L_BCM": 0.1}
    assert facts["runs"][2]["losses"] == {"L_feat": 0.1, "L_attn": 0.1}
    assert facts["runs"][0]["data"] == [
        {
            "format": "glyphsearch_curriculum",
            "difficulty": "mixed",
            "crops": 3840,
            "lists": 4800,
            "scenes": 17600,
        }
    ]
    for expected in ("plain fine-tuning | stage 1, BCM | stage 2, DAC", "CE + 0.1 L_BCM", "2 of 2 samples"):
        assert expected in card.text
    assert card.data.license == "apache-2.0" and card.data.model_name == "tiny_stage2"
    assert {"trl", "sft", "v-reflection"} <= set(card.data.tags)
    model = VReflectionForConditionalGeneration.from_pretrained(folder)
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}, bfloat16" in card.text
    for file in ("README.md", TRAINING_FACTS):
        assert str(tmp_path) not in (folder / file).read_text() and "/tmp/" not in (folder / file).read_text()
    # What was left says what the public card does, but for tags.
    ours = card.text
    write_card(folder)
    assert load(folder).text == ours


def test_a_trainer_tells_base_model_data_and_stage(make_trainer, model, tmp_path):
    model.name_or_path = "Qwen/Qwen2.5-VL-3B-Instruct"  # as if it had been loaded from there
    trainer = make_trainer(stage="2", hub_model_id="someone/model", seed=7, lambda_dac=0.5, lambda_attn=0.5)
    trainer.origin = RunOrigin(model.name_or_path, [{"path": "someone/rows", "split": "train"}])
    trainer.train()
    trainer.save_model()
    card, facts = load(tmp_path / "run"), facts_of(tmp_path / "run")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct" and card.data.license is None
    assert card.data.datasets == ["someone/rows"]
    assert "# model\n" in card.text and 'from_pretrained("someone/model"' in card.text
    assert "stage 2, DAC" in card.text and "CE + 0.5 L_feat + 0.25 L_attn" in card.text
    (run,) = facts["runs"]
    assert run["optimiser"]["learning_rate"] == 1e-3 and run["seed"] == 7
    assert run["tokens"] == trainer.progress.num_tokens
    assert run["versions"].keys() >= {"python", "vreflection", "torch", "transformers", "trl", "accelerate"}
    assert str(tmp_path) not in str(card) + json.dumps(facts)


def test_of_a_local_base_the_card_tells_the_name_alone_and_no_licence(make_trainer, checkpoint, tmp_path):
    trainer = make_trainer(stage="1", save_strategy="steps", save_steps=1, save_only_model=True)
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "run")  # of an earlier run
    trainer.train()
    draft = load(tmp_path / "run")  # written with the checkpoints, when the weights beside it may be an earlier run's
    assert "parameters |" not in draft.text and draft.data.license is None
    assert f"`{checkpoint.name}`" in draft.text and "| base model | not recorded |" in draft.text
    assert str(checkpoint) not in str(draft)
    for step in (1, 2):
        assert facts_of(tmp_path / "run" / f"checkpoint-{step}")["runs"][0]["steps"] == step
    assert "not recorded |" in draft.text
    trainer.save_model()
    with pytest.raises(InputError, match="no base_model, .*license"):
        check_card(write_card(tmp_path / "run").parent)


def test_the_signature_is_trls(make_trainer, tmp_path):
    trainer = make_trainer(stage="1")
    trainer.create_model_card("a name", "someone/rows", "one-tag")
    card = load(tmp_path / "run")
    assert "# a name\n" in card.text and card.data.datasets == ["someone/rows"] and "one-tag" in card.data.tags
    trainer.create_model_card(dataset_name=str(tmp_path), tags=["two", "tags"])
    card = load(tmp_path / "run")
    assert card.data.datasets is None and {"two", "tags"} <= set(card.data.tags) and "# run\n" in card.text


def test_the_earlier_runs_survive_where_a_run_writes_over_its_start(make_trainer, checkpoint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    shutil.copy(EMBEDDED / TRAINING_FACTS, folder)
    model = VReflectionForConditionalGeneration.from_pretrained(folder)
    trainer = make_trainer(trained=model, stage="1")
    for _ in range(2):  # saved twice, told once
        trainer.save_model()
    facts = read_training_facts(folder)
    assert facts["from_scratch"] and [run["stage"] for run in facts["runs"]] == ["sft", "1", "2", "path", "1"]


def test_damaged_facts_stop_a_run_before_it_begins(make_trainer, checkpoint, tmp_path):
    folder = tmp_path / "start"
    shutil.copytree(checkpoint, folder)
    (folder / TRAINING_FACTS).write_text("{}")
    with pytest.raises(InputError, match="`base_model` is missing"):
        make_trainer(trained=VReflectionForConditionalGeneration.from_pretrained(folder), stage="1")


def test_an_adapters_card(make_trainer, tmp_path):
    trainer = make_trainer(stage="1", peft_config=LoraConfig(r=4, lora_alpha=16))
    trainer.train()
    trainer.save_model()
    card = load(tmp_path / "run")
    assert card.data.library_name == "peft" and "vreflection merge run merged" in card.text
    assert "| adapter | `r=4`, `lora_alpha=16` |" in card.text and "all parameters" not in card.text


@pytest.mark.parametrize(
    "source, expected",
    [
        (
            {"path": "someone/rows", "split": "train"},
            {"format": "messages", "dataset": "someone/rows", "split": "train"},
        ),
        (
            {
                "path": "FOLDER/viscot.json",
                "format": "visual_cot",
                "image_folder": "FOLDER",
                "weight": 2,
                "paths": True,
            },
            {"format": "visual_cot", "local": "viscot.json", "weight": 2, "paths": True},
        ),
        (
            {"path": "someone/rows", "data_files": "FOLDER/x", "token": "secret"},
            {"format": "messages", "dataset": "someone/rows"},
        ),
        ({"format": "glyphsearch", "count": 8}, {"format": "glyphsearch", "count": 8}),
    ],
)
def test_of_a_source_no_path_and_no_token_is_told(tmp_path, source, expected):
    (tmp_path / "viscot.json").touch()
    given = {
        key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value
        for key, value in source.items()
    }
    assert public_source(given) == expected


def test_the_embedded_checkpoints_facts_are_its_recipes():
    """Its start was trained before there were such facts: they are what the recipes say. The last run's are its result file's."""
    started_from, runs = None, []
    for name in ("tiny_base", "tiny_stage1", "tiny_stage2"):
        script, _, args = parse([name, "--use_cpu"])
        versions = {"transformers": "5.23.0"}
        facts = RunOrigin(started_from, script.sources).facts(
            args, steps=args.max_steps, max_steps=args.max_steps, versions=versions
        )
        runs += facts["runs"]
        started_from = name
    facts = read_training_facts(EMBEDDED)
    *earlier, last = facts.pop("runs")
    assert facts == {"base_model": None, "from_scratch": True} and earlier == runs
    result = json.loads((ROOT / "experiments" / "chains" / "results" / "path_seed1.json").read_text())
    options, made_with = result["options"], result["made_with"]
    assert (last["stage"], last["seed"], last["steps"]) == ("path", result["seed"], result["steps_done"])
    assert last["batch"]["per_device"] == options["batch"] * result["rows"] // options["scenes"]
    assert last["data"][0]["count"] == options["scenes"]
    assert last["optimiser"]["learning_rate"] == options["learning_rate"]
    assert last["machine"] == {"gpu": made_with["machine"]}
    assert last["versions"] == {name: made_with[name] for name in ("torch", "transformers")}
