"""What a converted checkpoint holds and does, against torch, the stock class and `from_backbone`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released_checkpoints import FIELDS, NAMES, STEPS, WIDTH, edit, encode, released_modules, save_shards, write
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from vreflection_hub_card.conversion.converter import convert
from vreflection_hub_card.conversion.layouts import our_names
from vreflection_hub_card.glyphsearch import make_scene
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint
from vreflection_training.cli import main


ISOLATED = Path(__file__).parents[2] / "modeling" / "isolated.py"


def weights_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def backbone_of(stored: dict) -> dict[str, torch.Tensor]:
    """The stored weights of the backbone, by the names that the stock class has for them today."""
    old = {"visual.": "model.visual.", "model.": "model.language_model."}
    backbone = {}
    for name, tensor in stored.items():
        if not name.startswith(("box_feature_resampler.", "student_resampler.")):
            if not name.startswith(("model.visual.", "model.language_model.", "lm_head.")):
                head = next(head for head in old if name.startswith(head))
                name = old[head] + name.removeprefix(head)
            backbone[name] = tensor
    return backbone


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["released", "stage1", "lvr"])
def test_every_backbone_weight_is_the_same_bit_by_bit(tmp_path, kind, legacy, tied):
    stored = write(tmp_path / "in", kind=kind, legacy=legacy, tied=tied, shards=1 + 2 * legacy)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    model, _ = load_checkpoint(tmp_path / "out", "cpu")
    weights = weights_of(tmp_path / "out")
    expected = backbone_of(stored)
    assert weights.keys() == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    assert {name for name in weights if not name.startswith(("model.bcm.", "model.dac."))} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    config = model.config
    assert (config.has_bcm, config.has_dac) == (kind != "lvr", kind == "released")
    assert config.query_position == ("before" if kind == "lvr" else "at")
    assert config.tie_word_embeddings is tied and config.text_config.vocab_size == 512


def test_the_modules_compute_what_torchs_attention_computes(converted):
    model, _ = load_checkpoint(converted, "cpu")
    theirs = released_modules()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 11, WIDTH, generator=generator)
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    states = torch.randn(3, STEPS, WIDTH, generator=generator)
    bcm, dac = theirs["box_feature_resampler"], theirs["student_resampler"]
    pairs = (
        (bcm, bcm.queries.expand(3, -1, -1), model.model.bcm(features, mask)),
        (dac, states, model.model.dac(states, features, mask)),
    )
    for module, queries, (latents, attention) in pairs:
        mixed, expected = module.cross_attn(queries, features, features, key_padding_mask=~mask)
        torch.testing.assert_close(latents, module.output_norm(mixed), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(attention, expected, atol=1e-6, rtol=1e-4)


def test_configuration_tokens_and_decoding(released, converted):
    model, processor = load_checkpoint(converted, "cpu")
    source = json.loads((released / "config.json").read_text())
    ids = [source[name] for name in FIELDS]
    assert list(model.config.latent_token_ids) == [ids[0], ids[1], ids[3]]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == NAMES
    assert len(processor.tokenizer) == len(AutoTokenizer.from_pretrained(released))
    assert (model.generation_config.latent_steps, model.generation_config.latent_feedback) == (STEPS, "hidden")
    stock = GenerationConfig.from_pretrained(released)
    assert model.generation_config.eos_token_id == stock.eos_token_id
    # Training had turned the cache off, and its loss weights lay in config.json.
    assert model.config.text_config.use_cache and model.generation_config.use_cache
    written = (converted / "config.json").read_text()
    assert not [name for name in ("lvr", "resampler", "distillation", 'latent_end_token"') if name in written]


def test_it_reflects_with_its_own_tokens(converted):
    model, processor = load_checkpoint(converted, "cpu")
    inputs = encode(processor, "What is <|lvr_start|>?")
    start, slot, end = model.config.latent_token_ids
    assert not torch.isin(inputs["input_ids"], torch.tensor([start, slot, end])).any()
    tokens = model.generate(**inputs, reflect=True, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    assert new[:10] == [start, *[slot] * STEPS, end]
    trained = encode(processor, "What?", {"type": "reflection", "box": [0.0, 0.0, 0.5, 0.5]})
    assert trained["boxes"].tolist() == [[[0, 0, 32768, 32768, 0]] * STEPS]
    assert [trained["input_ids"][0].tolist().count(token) for token in (start, slot, end)] == [1, STEPS, 1]


@pytest.mark.slow
def test_the_folder_is_enough_where_nothing_of_ours_is_installed(converted, tmp_path):
    make_scene(1).image.save(tmp_path / "picture.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    ours = ["modeling_vreflection", "vreflection_hub_card", "vreflection_training"]
    arguments = [converted, tmp_path / "picture.png", tmp_path / "saved", *ours]
    command = [sys.executable, "-I", str(ISOLATED), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["models"] == ["VReflectionForConditionalGeneration"] and len(set(result["bits"])) == 1
    start, slot, end = result["config"][2]
    assert result["tokens"][0][:10] == [start, *[slot] * STEPS, end]


@pytest.mark.parametrize("kind", ["released", "stock", "ours"])
def test_inference_only_loads_in_the_stock_class_too(tmp_path, released, kind):
    source = {"released": released}.get(kind, tmp_path / "in")
    if kind == "stock":
        write(source, kind="stock", legacy=True)
    if kind == "ours":  # where it decodes by its hidden states
        shutil.copytree(EMBEDDED, source)
        decoding = GenerationConfig.from_pretrained(source)
        decoding.latent_feedback = "hidden"
        decoding.save_pretrained(source)
    assert main(["convert", str(source), str(tmp_path / "out"), "--inference-only"]) == 0
    model, processor = load_checkpoint(tmp_path / "out", "cpu")
    assert (model.config.has_bcm, model.config.has_dac) == (False, False)
    assert model.generation_config.latent_feedback == "hidden"
    assert not [name for name in weights_of(tmp_path / "out") if "bcm" in name or "dac" in name]
    stock, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = encode(processor)
    assert torch.equal(logits(stock, inputs), logits(model, inputs))
    if kind != "stock":  # a converted stock checkpoint has other rows for the new tokens
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        assert torch.equal(logits(theirs, inputs), logits(stock, inputs))


def test_one_of_ours_keeps_what_inference_needs(tmp_path):
    """Where it decodes by DAC, that includes DAC."""
    model, processor = load_checkpoint(EMBEDDED, "cpu", dtype=torch.bfloat16)
    said = {"latent_steps": 5, "latent_feedback": "dac", "latent_tolerance": 0.25, "reflect": True}
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--inference-only"]) == 0
    lean, leaner = load_checkpoint(tmp_path / "out", "cpu", dtype="auto")
    assert {name: getattr(lean.generation_config, name) for name in said} == said
    assert (lean.config.has_bcm, lean.config.has_dac) == (False, True)
    weights = weights_of(tmp_path / "out")
    assert [name for name in weights if "dac" in name] and not [name for name in weights if "bcm" in name]
    assert (
        lean.dtype == torch.bfloat16 and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    )
    assert lean.config.latent_token_ids == model.config.latent_token_ids
    assert leaner.chat_template == processor.chat_template
    inputs = encode(processor)
    options = {"reflect": True, "max_new_tokens": 12, "latent_feedback": "hidden", "do_sample": False}
    assert torch.equal(lean.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_stock_checkpoint_becomes_what_from_backbone_makes_of_it(tmp_path, tied, room):
    """With room for the tokens in its vocabulary and without; in bfloat16, so that the mean's precision counts."""
    write(tmp_path / "in", kind="stock", tied=tied, dtype=torch.bfloat16)
    if room:
        rows = len(AutoTokenizer.from_pretrained(tmp_path / "in")) + room
        write(tmp_path / "in", kind="stock", tied=tied, vocabulary=rows, dtype=torch.bfloat16)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    expected, processor = VReflectionForConditionalGeneration.from_backbone(
        tmp_path / "in", has_bcm=False, has_dac=False, dtype=torch.bfloat16
    )
    model, found = load_checkpoint(tmp_path / "out", "cpu", dtype="auto")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.state_dict().keys() == expected.state_dict().keys()
    loaded, made = model.config.to_dict(), expected.config.to_dict()
    for config in (loaded, made):
        for section in (config, config["text_config"], config["vision_config"]):
            for name in ("_name_or_path", "architectures", "auto_map", "dtype"):
                section.pop(name, None)
    assert loaded == made
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert found.chat_template == processor.chat_template


def test_modules_can_be_added_to_a_checkpoint_without_them(tmp_path):
    """To train them: what loads is asked for modules of its own."""
    write(tmp_path / "in", kind="stage1")
    convert(tmp_path / "in", tmp_path / "out")
    model, report = VReflectionForConditionalGeneration.from_pretrained(
        tmp_path / "out", has_dac=True, output_loading_info=True
    )
    assert model.model.bcm.is_trained and not model.model.dac.is_trained
    assert report["missing_keys"] and all(name.startswith("model.dac.") for name in report["missing_keys"])


def test_a_padded_vocabulary_and_half_precision_stay(tmp_path):
    stored = write(tmp_path / "in", dtype=torch.bfloat16, vocabulary=600)
    convert(tmp_path / "in", tmp_path / "out")
    weights = weights_of(tmp_path / "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert len(weights["lm_head.weight"]) == len(weights["model.language_model.embed_tokens.weight"]) == 600
    packed = stored["student_resampler.cross_attn.in_proj_weight"]
    names = our_names("student_resampler.cross_attn.in_proj_weight")
    assert torch.equal(torch.cat([weights[name] for name in names]), packed)
    assert VReflectionProcessor.from_pretrained(tmp_path / "out").latent_start_token == NAMES[0]


def test_a_tied_head_that_is_stored_all_the_same_is_left_out(tmp_path):
    stored = write(tmp_path / "in", tied=True)
    head = stored["model.language_model.embed_tokens.weight"].clone()
    save_shards(tmp_path / "in", {**stored, "lm_head.weight": head}, 2)
    convert(tmp_path / "in", tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")


def test_ids_may_stand_in_the_tokenizer_alone(tmp_path, released, converted):
    write(tmp_path / "in")
    edit(tmp_path / "in", **dict.fromkeys(FIELDS))
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == (converted / "config.json").read_text()
