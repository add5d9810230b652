import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from run_helpers import on_both_backbones
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from trl import ModelConfig

from modeling_vreflection.generation_vreflection import CACHE
from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_training import VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.adapters import (
    LANGUAGE_LAYERS,
    complete_peft_config,
    get_quantization_config,
    load_adapter,
    merge_adapter,
)
from vreflection_training.loading import load_model_and_processor
from vreflection_training.stages import SFT_STAGES, STAGES
from vreflection_training.tiny import save_tiny_backbone


TRAINED = {stage: set(STAGES[stage].trains) for stage in SFT_STAGES}
FED = {stage: next(iter(STAGES[stage].slots), None) for stage in SFT_STAGES}


@pytest.fixture(scope="module")
def rows():
    return glyphsearch_dataset("train", 8)


@pytest.fixture(scope="module")
def bases(checkpoint, processor, tmp_path_factory):
    """Folders of a base with a tied and one with an untied head (as 3B and 7B), whose BCM counts as trained."""
    folders = {}
    for tied in (True, False):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            model.model.bcm.norm.bias.fill_(0.01)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(1).contiguous())
        folders[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        model.save_pretrained(folders[tied])
        processor.save_pretrained(folders[tied])
    return folders


@pytest.fixture(scope="module")
def make_trainer(processor, rows):
    def make(base, output_dir, peft_config=None, quantization_config=None, **options):
        defaults = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        args = VReflectionSFTConfig(output_dir=str(output_dir), **{**defaults, **options})
        model = load(base, quantization_config=quantization_config)
        model.generation_config.latent_feedback = "dac"  # the base's folder says "hidden"
        peft_config = peft_config or LoraConfig(r=4, lora_dropout=0.1)
        return VReflectionSFTTrainer(
            model, args, processing_class=processor, train_dataset=rows, peft_config=peft_config
        )

    return make


def load(folder, **kwargs):
    return load_model_and_processor(str(folder), dtype=torch.float32, **kwargs)[0]


@pytest.fixture(
    scope="module",
    params=[f"{stage}-{head}" for stage in SFT_STAGES for head in ("tied", "untied")[: 1 + (stage != "joint")]],
)
def run(request, bases, make_trainer, tmp_path_factory):
    """One run of two steps, saved and merged."""
    stage, head = request.param.split("-")
    tied, folder = head == "tied", tmp_path_factory.mktemp(request.param)
    # The draw of Eq. 2 that leaves something to learn for BCM.
    bcm_learns = {"bernoulli_p": 0.0} if stage in ("1", "joint") else {}
    trainer = make_trainer(bases[tied], folder / "run", stage=stage, **bcm_learns)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    merge_adapter(folder / "adapter", folder / "merged")
    return SimpleNamespace(stage=stage, tied=tied, base=bases[tied], trainer=trainer, before=before, folder=folder)


def differing(model, other):
    """Names of weights that differ in any bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return {name for name in {*ours, *theirs} if not torch.equal(ours[name], theirs[name])}


@torch.no_grad()
def outputs(model, trainer, latent_inputs):
    """What a model gives for two training samples."""
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "boxes")
    batch = {name: batch[name] for name in names if name in batch}
    return model.eval()(**batch, latent_inputs=latent_inputs)


def test_adapters_and_what_the_stage_trains_move_and_the_rest_keeps_each_bit(run):
    rest, moved = set(), set()
    for name, value in run.trainer.model.named_parameters():
        changed = not torch.equal(value, run.before[name])
        assert changed <= value.requires_grad
        if "lora_" in name:
            assert changed and ".language_model.layers." in name, name
            moved.add(name.split(".lora_")[0].rpartition(".")[2])
        elif "modules_to_save" in name:
            # A key's bias shifts all of a query's scores alike, and softmax doesn't see it: its gradient is rounding.
            assert changed or name.endswith("k_proj.bias"), name
            moved.add(name.split(".")[3])
        elif "trainable_tokens" in name:
            # Which rows: the next test. Plain fine-tuning reads no reflection, and an untied input row rests.
            assert changed or ("embed_tokens" in name and run.stage == "sft" and not run.tied), name
        else:
            assert not changed, name
            rest.add(name.removeprefix("base_model.model.").split(".")[1])
    assert moved == set(LANGUAGE_LAYERS) | TRAINED[run.stage] and {"visual", "language_model"} <= rest


def test_of_the_vocabulary_the_three_tokens_rows_move_and_no_other(run):
    base, merged = load(run.base), load(run.folder / "merged")
    start, slot, end = base.config.latent_token_ids

    def moved(get):
        return set((get(base).weight != get(merged).weight).any(1).nonzero().flatten().tolist())

    # The softmax reaches every row of the head. Of the input embeddings, latents stand in the slot's place, and plain
    # fine-tuning has no reflections to read.
    expected = {start, slot, end} if run.tied else set() if run.stage == "sft" else {start, end}
    assert moved(lambda model: model.get_input_embeddings()) == expected
    assert moved(lambda model: model.get_output_embeddings()) == {start, slot, end}


def test_a_saved_adapter_on_a_fresh_base_is_the_same_to_the_bit(run):
    again, processor = load_adapter(run.folder / "adapter", dtype=torch.float32)
    assert not differing(again, run.trainer.model)
    for ours, theirs in zip(again.parameters(), run.trainer.model.parameters()):
        ours.requires_grad_(theirs.requires_grad)  # torch chooses its kernels by it, which round differently
    expected = outputs(run.trainer.model, run.trainer, FED[run.stage])
    got = outputs(again, run.trainer, FED[run.stage])
    assert ("teacher_latents" in got) == (run.stage != "sft")
    for name, value in expected.items():
        assert name == CACHE or torch.equal(got[name], value), name
    assert processor.tokenizer.get_vocab() == run.trainer.processing_class.tokenizer.get_vocab()


def test_a_merged_adapter_is_a_plain_checkpoint_with_the_same_outputs(run):
    merged = AutoModel.from_pretrained(run.folder / "merged", trust_remote_code=True)
    assert type(merged).__name__ == type(run.trainer.model.get_base_model()).__name__
    expected = outputs(run.trainer.model, run.trainer, FED[run.stage])
    torch.testing.assert_close(outputs(merged, run.trainer, FED[run.stage]).logits, expected.logits, atol=1e-5, rtol=0)
    # What the base came with, where no reflection trains.
    assert merged.generation_config.latent_feedback == STAGES[run.stage].slots.get(FED[run.stage], "dac")
    keys, base_keys = (set(load_file(folder / "model.safetensors")) for folder in (run.folder / "merged", run.base))
    assert keys == base_keys
    assert not list((run.folder / "merged").glob("adapter*"))
    base_config, config = (json.loads((f / "config.json").read_text()) for f in (run.base, run.folder / "merged"))
    assert config == base_config


def test_the_adapter_and_the_merged_model_answer_alike(run):
    # `generate` of a model with an adapter asks the wrapped head for more than its weight.
    merged = load(run.folder / "merged").eval()
    content = [{"type": "text", "text": "Which glyph is on the red cross?"}]
    prompt = run.trainer.processing_class.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt["reflect"] = True
    options = {"max_new_tokens": 14, "do_sample": False, "latent_feedback": "hidden"}
    expected = run.trainer.model.eval().generate(**prompt, **options)
    assert merged.config.latent_token_id in expected
    assert torch.equal(merged.generate(**prompt, **options), expected)


def test_on_a_stock_base_the_untrained_module_is_saved_and_stays(make_trainer, checkpoint, tmp_path):
    model_type = AutoConfig.from_pretrained(checkpoint).backbone_type
    stock = save_tiny_backbone(tmp_path / "stock", model_type=model_type)
    trainer = make_trainer(stock, tmp_path / "run", stage="1")
    dac = trainer.model.get_base_model().model.dac
    before = {name: value.clone() for name, value in dac.state_dict().items()}
    assert not any(value.requires_grad for value in dac.parameters())
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in dac.state_dict().items())
    trainer.save_model(str(tmp_path / "adapter"))
    torch.manual_seed(1)  # another draw than the one that was trained on
    again, _ = load_adapter(tmp_path / "adapter", dtype=torch.float32)
    assert {name.split(".")[4] for name in differing(again, trainer.model)} == {"original_module"}


def test_a_run_resumes_bit_for_bit(make_trainer, bases, tmp_path):
    straight = make_trainer(bases[False], tmp_path / "a", stage="1", max_steps=4)
    straight.train()
    options = {"stage": "1", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(bases[False], tmp_path / "b", **options).train()
    resumed = make_trainer(bases[False], tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert not differing(straight.model, resumed.model)
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (straight, resumed)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    other = make_trainer(bases[False], tmp_path / "b", LoraConfig(r=4, lora_alpha=64), **options)
    with pytest.raises(ValueError, match="`lora_alpha` was 8 and is 64"):
        other.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))


@pytest.mark.parametrize("stage", ["path", pytest.param("2", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing(make_trainer, bases, tmp_path, stage):
    peft_config = LoraConfig(r=4)
    options = {"stage": stage, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 1e9}
    plain, checkpointed = (
        make_trainer(bases[False], tmp_path, peft_config, gradient_checkpointing=on, **options) for on in (False, True)
    )
    plain.train()
    checkpointed.train()
    got = dict(checkpointed.model.named_parameters())
    for name, value in plain.model.named_parameters():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpoint", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("freeze_vision", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_of_the_other_backbone_loads_and_merges(make_trainer, bases, tmp_path, freeze_vision):
    trainer = make_trainer(bases[True], tmp_path / "run", stage="path", freeze_vision=freeze_vision)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert not any(".base_layer." in name for name in moved)
    parts = {"attn.qkv", "attn.proj", "mlp.linear_fc1", "merger.linear_fc2", "deepstack_merger_list.1.linear_fc1"}
    adapted = {part for part in parts if any(f"{part}.lora_B" in name for name in moved)}
    assert adapted == (set() if freeze_vision else parts)
    trainer.save_model(str(tmp_path / "adapter"))
    again, processor = load_adapter(tmp_path / "adapter", dtype=torch.float32)
    assert not differing(again, trainer.model) and type(processor) is type(trainer.processing_class)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(merged).__name__ == "VReflectionQwen3VLForConditionalGeneration"
    assert merged.generation_config.latent_feedback == "dac"
    expected = outputs(trainer.model, trainer, "bcm")
    for name in ("logits", "student_latents"):
        torch.testing.assert_close(outputs(merged, trainer, "bcm")[name], expected[name], atol=1e-5, rtol=0)


def test_of_a_mixture_of_experts_the_attention_alone_is_adapted(tmp_path):
    model = load(save_tiny_backbone(tmp_path, model_type="qwen3_vl_moe"))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = {f"model.language_model.layers.{layer}.self_attn.{name}" for layer in range(4) for name in attention}
    assert adapted(model, LoraConfig(), stage="path") == expected


def settings(output_dir="unused", **options):
    return VReflectionSFTConfig(output_dir=output_dir, use_cpu=True, bf16=False, report_to="none", **options)


def adapted(model, peft_config, **options):
    """The modules that got an adapter, by name."""
    wrapped = get_peft_model(model, complete_peft_config(peft_config, model, settings(**options)))
    return {
        name.removeprefix("base_model.model.") for name, module in wrapped.named_modules() if hasattr(module, "lora_A")
    }


@on_both_backbones
@pytest.mark.parametrize("form", ["default", "names", "all-linear", "pattern"])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_adapters_never_go_into_bcm_dac_or_a_frozen_vision_encoder(bases, form, freeze_vision):
    model = load(bases[True])
    names = (
        "q_proj",
        "up_proj",
        *(() if freeze_vision else ("linear_fc1",)),
    )  # the last is in Qwen3-VL's vision encoder
    targets = {"names": list(names), "pattern": rf".*\.({'|'.join(names)})", "all-linear": form}.get(form)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    allowed = ("model.language_model.",) if freeze_vision else ("model.language_model.", "model.visual.")
    expected = {name for name in linear if name.startswith(allowed)}
    if form in ("names", "pattern"):
        expected = {name for name in expected if name.endswith(names)}
    peft_config = LoraConfig(target_modules=targets)
    assert adapted(model, peft_config, stage="joint", freeze_vision=freeze_vision) == expected
    # What the user passed stays what it was.
    assert peft_config.exclude_modules is peft_config.modules_to_save is peft_config.trainable_token_indices is None


def test_what_the_user_asks_for_is_kept(bases):
    peft_config = LoraConfig(
        r=7,
        exclude_modules=["layers.0.self_attn.q_proj"],
        modules_to_save=["model.language_model.norm"],
        trainable_token_indices=[5, 7],
        layers_to_transform=[0, 1],
    )
    model = load(bases[False])
    ids = list(model.config.latent_token_ids)
    got = complete_peft_config(peft_config, model, settings(stage="2"))
    assert (got.r, got.task_type, got.modules_to_save) == (7, "CAUSAL_LM", ["model.language_model.norm", "dac"])
    assert got.trainable_token_indices == {"embed_tokens": [5, 7, *ids], "lm_head": ids}
    names = adapted(model, peft_config, stage="2")
    assert {name.split(".")[3] for name in names} == {"0", "1"}
    assert len(names) == 2 * len(LANGUAGE_LAYERS) - 1
    # A head that the user trains whole needs no rows.
    whole = complete_peft_config(LoraConfig(modules_to_save=["lm_head"]), load(bases[False]), settings(stage="sft"))
    assert whole.trainable_token_indices == {"embed_tokens": ids} and whole.modules_to_save == ["lm_head"]


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({"modules_to_save": ["bcm"]}, {"stage": "2"}, "'bcm' means model.bcm, which stage '2'"),
        ({"modules_to_save": ["norm"]}, {"stage": "1"}, r"'norm' means model\.(bcm|visual\.merger)\.norm"),
        ({"modules_to_save": ["visual"]}, {}, "'visual' means model.visual"),
        ({"modules_to_save": ["lm_head"]}, {}, "tied to the input embeddings"),
        ({"trainable_token_indices": {"lm_head": [3]}}, {}, "tied to the input embeddings"),
        ({"target_modules": ["q_proj", "qkv"]}, {}, "'qkv' means model.visual.blocks.0.attn.qkv"),
        ({"target_modules": r".*\.bcm\..*_proj"}, {}, "no adapter goes into BCM"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "takes no adapter"),
        ({"target_modules": ["q_proj"]}, {"freeze_vision": False}, "nothing in `target_modules` is in the vision"),
        ({"bias": "all"}, {}, "biases of frozen modules"),
    ],
)
def test_contradictions_raise(bases, fields, options, message):
    with pytest.raises(ValueError, match=message):
        complete_peft_config(LoraConfig(**fields), load(bases[True]), settings(**{"stage": "1", **options}))


def test_tokens_of_a_module_that_is_not_there_raise(bases):
    with pytest.raises(ValueError, match="'wte'} not found in the base model"):
        adapted(load(bases[True]), LoraConfig(trainable_token_indices={"wte": [3]}), stage="1")


def test_other_methods_and_a_base_without_a_folder_raise(bases):
    model = load(bases[True])
    with pytest.raises(TypeError, match="must be a `peft.LoraConfig`, got `PrefixTuningConfig`"):
        complete_peft_config(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), model, settings())
    model.name_or_path = str(bases[True] / "gone")
    with pytest.raises(ValueError, match="there is nothing at .*gone.*: save the base"):
        complete_peft_config(LoraConfig(), model, settings())


def test_an_adapter_names_the_exact_commit_of_a_hub_base(bases):
    model = load(bases[True])
    assert complete_peft_config(LoraConfig(), model, settings()).revision is None
    model.config._commit_hash = "0123abc"
    assert complete_peft_config(LoraConfig(), model, settings()).revision == "0123abc"
    assert complete_peft_config(LoraConfig(revision="v1"), model, settings()).revision == "v1"


def test_an_adapter_keeps_the_fields_that_its_base_was_loaded_with(bases, tmp_path, rows, processor):
    # Fields of the run, which the base's folder doesn't hold.
    model = load(bases[True], region_pooling="roi_align", query_position="at")
    args = settings(tmp_path, stage="sft")
    trainer = VReflectionSFTTrainer(
        model, args, processing_class=processor, train_dataset=rows, peft_config=LoraConfig(r=2)
    )
    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    config = load(tmp_path / "merged").config
    assert (config.region_pooling, config.query_position) == ("roi_align", "at")


def test_a_merge_refuses_to_overwrite_and_another_base(run, tmp_path):
    for folder in (run.folder / "adapter", run.base):
        with pytest.raises(ValueError, match="written over what it is made of"):
            merge_adapter(run.folder / "adapter", folder)
    shutil.copytree(run.folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({**config, "latent_end_token_id": 3}))
    with pytest.raises(ValueError, match="another base than it was trained on"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_a_model_that_carries_an_adapter_is_refused(run, rows, tmp_path):
    with pytest.raises(ValueError, match="carries an adapter already: merge it"):
        VReflectionSFTTrainer(run.trainer.model, settings(tmp_path), train_dataset=rows)


@pytest.mark.slow
def test_a_quantized_base_trains_and_merges_onto_the_full_weights(make_trainer, bases, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    assert get_quantization_config(ModelConfig()) is None
    with pytest.raises(ValueError, match="A quantized base needs `bf16=True`"):
        make_trainer(bases[False], tmp_path, quantization_config=quantization, stage="1")
    trainer = make_trainer(bases[False], tmp_path / "run", quantization_config=quantization, bf16=True, stage="1")
    full = load(bases[False])
    for name, module in trainer.model.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert name.startswith("model.language_model.layers."), name
    bcm = trainer.model.get_base_model().model.bcm
    for name, value in full.model.bcm.named_parameters():  # exact at the start, and not rounded to bfloat16
        held = bcm.modules_to_save["default"].get_parameter(name)
        assert held.dtype == torch.float32 and torch.equal(held, value), name
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    ids = list(full.config.latent_token_ids)
    for name, layer in (
        ("model.language_model.embed_tokens", full.model.language_model.embed_tokens),
        ("lm_head", full.lm_head),
    ):
        held = before[f"base_model.model.{name}.token_adapter.trainable_tokens_delta.default"]
        assert held.dtype == torch.float32 and torch.equal(held, layer.weight[ids]), name
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert torch.equal(value, before[name]) != value.requires_grad, name

    trainer.save_model(str(tmp_path / "adapter"))
    again, _ = load_adapter(tmp_path / "adapter", dtype=torch.float32, quantization_config=quantization)
    for name in differing(again, trainer.model):  # peft loads in float32 what trl trained in bfloat16
        assert "lora_" in name
    with pytest.raises(ValueError, match="is quantized"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", quantization_config=quantization)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, saved = load(tmp_path / "merged"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    peft_config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    for name, value in full.named_parameters():
        layer = name.removesuffix(".weight")
        if f"base_model.model.{layer}.lora_A.weight" in saved:
            a, b = (saved[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
            expected = value + peft_config.lora_alpha / peft_config.r * b @ a
            torch.testing.assert_close(merged.get_parameter(name), expected, rtol=1e-5, atol=1e-7, msg=name)
        elif name.startswith("model.visual."):
            assert torch.equal(merged.get_parameter(name), value)
