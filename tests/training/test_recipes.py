"""The shipped recipes hold the numbers that they should, and each trains: the same options, with the tiny model and a few rows."""

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import get_scheduler

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_training import VReflectionGRPOConfig, VReflectionSFTConfig
from vreflection_training.data.sources import load_rows
from vreflection_training.recipe import build_trainer, parse
from vreflection_training.recipe_files import ACCELERATE_CONFIGS, RECIPES
from vreflection_training.tiny import save_tiny_backbone


PAPER = [f"qwen2_5_vl_{size}_{stage}" for size in ("7b", "3b") for stage in ("sft", "stage1", "stage2")]
LORA = "qwen2_5_vl_7b_stage1_lora"
RELEASED = ["released_code", "released_code_stage2"]
# Ours, beside what it is modelled on.
PATH = {
    "path_3b": "qwen2_5_vl_3b_stage1",
    "path_7b": "qwen2_5_vl_7b_stage1",
    "path_7b_lora": LORA,
    "path_tiny": "tiny_stage1",
}
PATH_LARGE = [name for name in PATH if name != "path_tiny"]
# On the other backbone, beside what each repeats.
QWEN3 = {
    "qwen3_vl_8b_path_lora": "path_7b_lora",
    **{
        f"qwen3_vl_{size}_{run}": f"{'path_7b' if run == 'path' else f'qwen2_5_vl_7b_{run}'}"
        for size in ("4b", "8b")
        for run in ("path", "stage1", "stage2")
    },
}
ADAPTERS = [LORA, "path_7b_lora", "qwen3_vl_8b_path_lora"]
LARGE = [*PAPER, LORA, *RELEASED, *PATH_LARGE, *QWEN3]
TINY = ["tiny_base", "tiny_stage1", "tiny_stage2", "path_tiny"]
TINY += ["tiny_qwen3_vl_base", "tiny_qwen3_vl", "tiny_qwen3_vl_longer"]
# By reward.
REWARDED = ["tiny_grpo", "path_7b_grpo"]
# What a machine without a GPU can't do.
ON_CPU = "--use_cpu true --dtype float32 --attn_implementation sdpa".split()
SHORT = (
    "--max_steps 2 --warmup_steps 0 --gradient_accumulation_steps 1 --dataloader_num_workers 0 --save_strategy no "
    "--sample_every 0 --report_to none --logging_steps 1 --disable_tqdm true"
).split()


def side(name: str) -> int:
    """Pixels that an image token is wide and high."""
    return 32 if name in QWEN3 else 28


def read(name: str) -> dict:
    """A recipe's options as parsed, by name, from whichever part they belong to."""
    parsed = parse([name, "--use_cpu", "true"])
    assert isinstance(parsed[-1], VReflectionGRPOConfig if name in REWARDED else VReflectionSFTConfig)
    return {field.name: getattr(part, field.name) for part in parsed for field in fields(part)}


def test_the_lists_name_every_recipe():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*LARGE, *TINY, *REWARDED}


@pytest.mark.parametrize("name", [*LARGE, *TINY, *REWARDED])
def test_the_recipe_parses(name):
    options = read(name)
    assert options["output_dir"] == f"outputs/{name}" and options["max_steps"] > 0


@pytest.mark.parametrize("name", [*LARGE, "path_7b_grpo"])
def test_the_head_says_how_to_run_it(name):
    head = re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text()).group()
    recipe, engine = re.search(r"# Run:  vreflection train (\S+) --accelerate_config (\S+)\n", head).groups()
    assert recipe == name and (ACCELERATE_CONFIGS / f"{engine}.yaml").is_file()
    assert "# Hardware: " in head and f"`vreflection check {name}`" in head
    for source in yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["datasets"]:
        assert all(source.get(key, "") in head for key in ("path", "image_folder", "scene_graphs"))


# Section 4.1 of the paper.
@pytest.mark.parametrize("name", LARGE)
def test_what_the_paper_gives_for_all_runs(name):
    options = read(name)
    expected = {
        "min_pixels": 128 * side(name) ** 2,
        "max_pixels": 5120 * side(name) ** 2,
        "sample_packing": True,
        "max_samples_per_pack": 4,
        "long_sample_length": 4095 if name in RELEASED else 4096,  # the released code's test is >=
        "max_length": 16384,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "weight_decay": 0.1,
        "freeze_vision": True,
        "attention_temperature": 1.0,
        "attention_epsilon": 1e-9,
        "bernoulli_p": 0.5,
        "on_bad_row": "error",
    }
    assert {key: options[key] for key in expected} == expected
    assert "bf16" not in yaml.safe_load((RECIPES / f"{name}.yaml").read_text())  # on where a GPU has it
    assert options["optim"] == "adamw_torch" and options["lr_scheduler_type"] == "cosine"


# learning rate, steps, warm-up steps (3 %), stage
@pytest.mark.parametrize("size", ["7b", "3b"])
@pytest.mark.parametrize(
    "run, expected",
    [("sft", (1e-5, 2500, 75, "sft")), ("stage1", (1e-5, 2500, 75, "1")), ("stage2", (5e-6, 1250, 38, "2"))],
)
def test_schedule_of_the_paper(size, run, expected):
    args = parse([f"qwen2_5_vl_{size}_{run}", "--use_cpu", "true"])[-1]
    warmup = args.get_warmup_steps(args.max_steps)
    assert (args.learning_rate, args.max_steps, warmup, args.stage) == expected
    # The learning rate peaks at the end of the warm-up, and is near 0 at the end.
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, args.max_steps).lr_lambdas[0]
    assert schedule(warmup) == 1 and schedule(warmup // 2) < 1 and schedule(warmup + 1) < 1
    assert schedule(args.max_steps) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [*PAPER, LORA])
def test_losses_of_the_paper(name):
    options = read(name)
    stage = options["stage"]
    expected = {
        "lambda_bcm": 0.1 if stage == "1" else 0.0,
        "lambda_dac": 0.1 if stage == "2" else 0.0,
        "lambda_feat": 1.0 if stage == "2" else 0.0,
        "lambda_attn": 1.0 if stage == "2" else 0.0,
        "latent_loss": "l1",
        "alignment": "stochastic",
        "bcm_receives_ce": True,
        "slot_ce": False,
        "latent_inputs": {"sft": None, "1": "bcm", "2": "dac"}[stage],
        "latent_feedback": {"sft": None, "1": "hidden", "2": "hidden"}[stage],
        "attention_target": {"sft": None, "1": None, "2": "teacher"}[stage],
        "allow_untrained_bcm": False,
        # Stage 2 takes the checkpoint's.
        "model_options": {"patch_positions": "none"} if stage == "1" else None,
    }
    assert {key: options[key] for key in expected} == expected


# design.md, section 2.
@pytest.mark.parametrize("name", PATH)
def test_losses_of_the_path(name):
    options = read(name)
    expected = {
        "stage": "path",
        "lambda_bcm": 0.0,
        "lambda_dac": 1.0,
        "lambda_feat": 1.0,
        "lambda_attn": 0.1,
        "latent_loss": "l1",
        "latent_inputs": "bcm",
        "latent_feedback": "dac",
        "attention_target": "box",
        "bcm_receives_ce": True,
        "freeze_vision": True,
    }
    assert {key: options[key] for key in expected} == expected


def difference(one, other):
    """The options in which two recipes differ."""
    one, other = read(one), read(other)
    return {key for key in one if one[key] != other[key]}


@pytest.mark.parametrize("name, model", PATH.items())
def test_a_path_differs_from_stage_1_in_its_losses_boxes_and_positions_alone(name, model):
    losses = {"stage", "lambda_bcm", "lambda_dac", "lambda_feat", "lambda_attn", "attention_target", "latent_feedback"}
    losses.add("model_options")  # looks of a path know where they are
    assert read(name)["model_options"] is None and read(model)["model_options"] == {"patch_positions": "none"}
    tiny = {
        "dataset_options",
        "eval_datasets",
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "predict_with_generate",
        "do_eval",
    }
    assert difference(name, model) == {*losses, "output_dir", *(tiny if name == "path_tiny" else {"datasets"})}
    if name in PATH_LARGE:
        formats = {source["format"]: source for source in read(name)["datasets"]}
        assert formats["visual_cot"]["paths"] is True
        assert set(formats) == ({"visual_cot"} if name == "path_3b" else {"visual_cot", "gqa"})
    else:
        assert read(model)["dataset_options"] == read(name)["dataset_options"] | {"paths": False}


def test_the_runs_of_the_paper_differ_in_what_they_say_only():
    names = {"output_dir", "model_name_or_path"}
    schedule = {"learning_rate", "max_steps", "save_steps"}
    slots, teacher = {"stage", "latent_inputs"}, {"lambda_dac", "lambda_feat", "lambda_attn", "attention_target"}
    sft, first, second = (f"qwen2_5_vl_7b_{stage}" for stage in ("sft", "stage1", "stage2"))
    assert difference(sft, first) == {"output_dir", *slots, "lambda_bcm", "latent_feedback", "model_options"}
    assert difference(first, second) == {*names, "model_options", *slots, "lambda_bcm", *teacher, *schedule}
    for stage in ("sft", "stage1", "stage2"):
        assert difference(f"qwen2_5_vl_7b_{stage}", f"qwen2_5_vl_3b_{stage}") == names
    adapters = {"use_peft", "lora_r", "lora_alpha"}
    assert difference("qwen2_5_vl_7b_stage1", LORA) == {
        *{"output_dir", "dtype", "learning_rate", "gradient_accumulation_steps"},
        *adapters,
    }


@pytest.mark.parametrize("name, model", QWEN3.items())
def test_another_backbone_is_another_model_and_its_pixels(name, model):
    assert difference(name, model) == {"output_dir", "model_name_or_path", "min_pixels", "max_pixels"}
    if not name.endswith("stage2"):
        size = name.split("_")[2].upper()
        assert read(name)["model_name_or_path"] == f"Qwen/Qwen3-VL-{size}-Instruct"


def test_a_step_sees_as_many_packs_on_one_gpu_with_lora_as_on_eight():
    for name, full in ((LORA, "qwen2_5_vl_7b_stage1"), ("path_7b_lora", "path_7b")):
        assert read(name)["gradient_accumulation_steps"] == 8 * read(full)["gradient_accumulation_steps"]


@pytest.mark.parametrize(
    "first, second",
    [
        (f"{model}_stage1", f"{model}_stage2")
        for model in ("qwen2_5_vl_7b", "qwen2_5_vl_3b", "qwen3_vl_4b", "qwen3_vl_8b")
    ]
    + [tuple(RELEASED)],
)
def test_stage_2_starts_from_stage_1(first, second):
    assert read(second)["model_name_or_path"] == read(first)["output_dir"]


def test_full_runs_keep_float32_weights_and_adapters_a_bf16_base():
    # In bf16 with 8 bits, 0.02 - 1e-5 is 0.02 again.
    assert torch.tensor(0.02, dtype=torch.bfloat16) - 1e-5 == torch.tensor(0.02, dtype=torch.bfloat16)
    assert {read(name)["dtype"] for name in LARGE if name not in ADAPTERS} == {"float32"}
    assert {read(name)["dtype"] for name in ADAPTERS} == {"bfloat16"}


# The column "released code" of design.md's section 3, and the numbers of the authors' scripts.
RELEASED_BOTH = {
    "latent_loss": "mse",
    "latent_inputs": "bcm",
    "latent_feedback": "hidden",
    "gradient_accumulation_steps": 8,
    "max_steps": 2500,
    "warmup_steps": 0.03,
    "seed": 42,
    "logging_steps": 1,
    "dataloader_num_workers": 8,
}
RELEASED_STAGE = {
    "released_code": {
        "stage": "1",
        "alignment": "symmetric",
        "bcm_receives_ce": False,
        "slot_ce": True,
        "closing_ce": True,
        "lambda_bcm": 0.5,
        "learning_rate": 1e-5,
        "save_steps": 300,
        "save_total_limit": 10,
    },
    "released_code_stage2": {
        "stage": "2",
        "slot_ce": False,
        "closing_ce": True,
        "lambda_dac": 1.0,
        "lambda_feat": 1.0,
        "lambda_attn": 1.0,
        "attention_target": "teacher",
        "learning_rate": 1e-6,
        "save_steps": 100,
        "save_total_limit": 25,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_behaviour(name):
    options = read(name)
    expected = RELEASED_BOTH | RELEASED_STAGE[name]
    assert {key: options[key] for key in expected} == expected


def test_the_released_architecture_is_chosen_in_stage_1_and_kept_in_stage_2():
    assert read("released_code")["model_options"] == {
        "latent_tokens": ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"],
        "query_position": "at",
        "region_pooling": "patch",
        "patch_positions": "none",
    }
    assert read("released_code_stage2")["model_options"] is None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and stage 1 checkpoints where the large recipes look for them."""
    place = tmp_path_factory.mktemp("place")
    write_visual_cot(place / "data")
    write_gqa(place / "data")
    for name in ("qwen2_5_vl", "qwen3_vl"):
        save_tiny_backbone(place / name, model_type=name)
    architecture = read("released_code")["model_options"]
    for name in (recipe for recipe in LARGE if recipe.endswith("stage2")):
        stock, folder = place / stock_folder(name), read(name)["model_name_or_path"]
        options = architecture if name in RELEASED else {}
        model, processor = VReflectionForConditionalGeneration.from_backbone(stock, dtype=torch.float32, **options)
        with torch.no_grad():
            model.model.bcm.norm.bias.fill_(0.01)  # counts as trained
        for part in (model, processor):
            part.save_pretrained(place / folder)
    return place


def stock_folder(name: str) -> str:
    """The tiny stock folder in the place of a recipe's backbone."""
    return "qwen3_vl" if name in QWEN3 else "qwen2_5_vl"


def write_visual_cot(folder: Path):
    """Eight rows as the release and the authors' formatted file have them, with pictures of noise, and their meta file."""
    images = folder / "images" / "coco"
    images.mkdir(parents=True)
    generator, rows, release = np.random.default_rng(0), [], []
    for number in range(8):
        picture = Image.fromarray(generator.integers(0, 256, (84, 84 + 28 * (number % 3), 3), dtype=np.uint8))
        picture.save(images / f"{number}.png")
        conversation = [
            {"from": "human", "value": "<image>\nWhich glyph is on the red triangle?"},
            {"from": "gpt", "value": f"<lvr>\n<answer> {number} </answer>"},
        ]
        row = {"dataset": "coco", "image": [f"coco/{number}.png"], "conversations": conversation}
        rows.append(row | {"bboxes": [[0.1, 0.2, 0.5, 0.7]]})
        asked = "<image>\nWhich glyph? Please provide the bounding box coordinate of the region that can help you."
        said = [("human", asked), ("gpt", "[0.1, 0.2, 0.5, 0.7]"), ("human", "<image>"), ("gpt", str(number))]
        turns = [{"from": speaker, "value": value} for speaker, value in said]
        path = f"coco/{number}.png"
        release.append({"dataset": "coco", "image": [path, f"{path}###[8, 17, 42, 59]"], "conversations": turns})
    (folder / "viscot_363k.json").write_text(json.dumps(release))
    (folder / "viscot_363k_lvr_formatted.json").write_text(json.dumps(rows))
    meta = [
        {
            "ds_name": "viscot_2",
            "data_path": "viscot_363k_lvr_formatted.json",
            "image_folder": "images",
            "ds_type": "Q_A",
        }
    ]
    (folder / "meta_data_lvr_sft_stage1.json").write_text(json.dumps(meta))


def write_gqa(folder: Path):
    """Eight of GQA's questions about Visual CoT's pictures here, every other one about the whole scene."""
    (folder / "gqa").mkdir()
    (folder / "images/gqa").mkdir()
    graphs, questions = {}, {}
    for number in range(8):
        name = str(number)
        Image.open(folder / "images/coco" / f"{name}.png").save(folder / "images/gqa" / f"{name}.jpg")
        things = {str(10 + thing): {"x": 10 * thing, "y": 5, "w": 30, "h": 40} for thing in (1, 2)}
        graphs[name] = {"width": 84 + 28 * (number % 3), "height": 84, "objects": things}
        program = (
            [("select", "glyph (11)"), ("relate", "glyph,left of,s (12)")] if number % 2 else [("select", "scene")]
        )
        questions[name] = {
            "imageId": name,
            "question": "Which one is it?",
            "answer": name,
            "isBalanced": True,
            "semantic": [{"operation": operation, "argument": argument} for operation, argument in program],
        }
    (folder / "gqa/train_balanced_questions.json").write_text(json.dumps(questions))
    (folder / "gqa/train_sceneGraphs.json").write_text(json.dumps(graphs))


@pytest.mark.parametrize("name", ["path_7b", "path_7b_lora"])
def test_half_of_the_rows_of_a_path_at_7b_are_gqas_and_some_have_no_reflection(place, monkeypatch, name):
    monkeypatch.chdir(place)
    script, _, args = parse([name, "--use_cpu", "true"])
    rows = load_rows(script.sources, seed=args.seed).to_list()
    assert {row["error"] for row in rows} == {None}
    shares = Counter(row["dataset"] for row in rows)
    assert len({row["id"] for row in rows}) == 16 and min(shares.values()) > 0.2 * len(rows)
    assert {row["no_reflection"] for row in rows} == {None, "program of scene"}


@pytest.fixture
def dry_run(place, tmp_path, monkeypatch):
    """Builds a recipe's trainer, from the tiny model instead of the published one, and trains two steps."""
    monkeypatch.chdir(place)

    def run(name):
        start = read(name)["model_name_or_path"]
        start = stock_folder(name) if start is not None and start.startswith("Qwen/") else start
        parsed = parse([name, "--model_name_or_path", start, "--output_dir", str(tmp_path), *ON_CPU, *SHORT])
        trainer = build_trainer(*parsed)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        after = trainer.model.named_parameters()
        return trainer, {name for name, weight in after if not torch.equal(weight, before[name])}

    return run


# One of each kind; CI runs the others, too.
QUICK = ("path_3b", "path_7b_lora", "qwen3_vl_8b_path")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LARGE]
)
def test_dry_run(dry_run, name):
    if name in ADAPTERS:
        pytest.importorskip("peft")
    trainer, changed = dry_run(name)
    stage = trainer.args.stage
    assert trainer.state.global_step == 2

    # The stage's losses, and no others.
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("loss_")}
    terms = {"sft": set(), "1": {"loss_bcm"}}.get(stage, {"loss_feat", "loss_attn"})
    assert logged == {"loss_ce", *terms}

    # What trains: the language model, or its adapters; BCM in stage 1, DAC in stage 2, both in path; never the vision encoder.
    modules = {
        module for module in ("visual", "bcm", "dac", "language_model") for path in changed if f".{module}." in path
    }
    assert modules == {"language_model", *{"sft": (), "1": ("bcm",), "2": ("dac",), "path": ("bcm", "dac")}[stage]}
    assert any("lora_" in path for path in changed) == (name in ADAPTERS)

    # Several samples shared a row, at the paper's resolution: below 128 image tokens a picture is enlarged.
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and len(batch["sample_ids"]) == 4
    assert (batch["image_grid_thw"].prod(-1) // 4 >= 128).all()
    assert trainer.processing_class.image_processor.size["longest_edge"] == 5120 * side(name) ** 2

    # Architecture and names of the tokens: from stage 1's recipe, and from its checkpoint in stage 2.
    config, tokenizer = trainer.model.config, trainer.processing_class.tokenizer
    released = name in RELEASED
    tokens = ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"] if released else ["<|sovt|>", "<|lvr|>", "<|eovt|>"]
    assert tokenizer.convert_ids_to_tokens(config.latent_token_ids) == tokens
    assert config.query_position == ("at" if released else "before")


@pytest.mark.slow
def test_dry_run_by_reward(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    assert read("path_7b_grpo")["model_name_or_path"] == read("path_7b")["output_dir"]
    assert read("tiny_grpo")["model_name_or_path"] == read("path_tiny")["output_dir"]
    at = SHORT.index("--sample_every")
    short = SHORT[:at] + SHORT[at + 2 :]  # which that stage doesn't have
    small = "--max_completion_length 16 --per_device_train_batch_size 4 --num_generations 2".split()
    start = ["--model_name_or_path", "qwen2_5_vl", "--output_dir", str(tmp_path)]
    script, *parsed = parse(["path_7b_grpo", *start, *ON_CPU, *short, *small])
    assert script.reward_funcs == ["exact_answer", "reflection_format"]
    trainer = build_trainer(script, *parsed)
    trainer.train()
    assert trainer.state.global_step == 2
    row = trainer.train_dataset[1]
    assert row["answer"] == "1" and [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
