"""From a stock folder to a V-Reflection model, from there to a folder, and from that folder alone back to a model."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from isolation import run_isolated, sha256
from randomise import randomise
from reference import ask, encode, picture
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Qwen2_5_VLConfig

import modeling_vreflection
from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from vreflection_training.tiny import tiny_backbone, tiny_tokenizer


PACKAGE = Path(modeling_vreflection.__file__).parent


def write_stock(folder, keys="new", tied=True, vocabulary=None) -> dict[str, torch.Tensor]:
    """Writes a stock checkpoint with the key names of one age or the other; returns its weights under the new names."""
    model, tokenizer, image_processor = tiny_backbone()
    config = model.config
    config.tie_word_embeddings = tied
    config.text_config.vocab_size = vocabulary or config.text_config.vocab_size
    torch.manual_seed(1)
    model = type(model)(config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = {name: tensor for name, tensor in weights.items() if not (tied and name == "lm_head.weight")}
    if keys == "legacy":
        stored = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
            for name, tensor in stored.items()
        }
        assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.norm.weight"} <= stored.keys()
    for part in (config, tokenizer, image_processor):
        part.save_pretrained(folder)
    save_file(stored, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    return weights


def check_backbone(model, weights, first_id):
    """All weights are the stock's bit by bit, except the rows of the three tokens, which are at the mean."""
    ours = model.state_dict()
    for name, tensor in weights.items():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            kept = torch.arange(len(tensor))
            kept = kept[(kept < first_id) | (kept >= first_id + 3)]
            assert torch.equal(ours[name][kept], tensor[kept]), name
            mean = tensor[:first_id].mean(0)
            for row in ours[name][first_id : first_id + 3]:
                torch.testing.assert_close(row, mean, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(ours[name], tensor), name
    extra = {name for name in ours if name not in weights}
    assert all(name.startswith(("model.bcm.", "model.dac.")) for name in extra) and extra


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", ["new", "legacy"])
def test_a_stock_checkpoint_loads_whole(tmp_path, keys, tied):
    weights = write_stock(tmp_path, keys, tied)
    model, processor = VReflectionForConditionalGeneration.from_backbone(tmp_path)
    first_id = len(processor.tokenizer) - 3
    assert model.config.latent_token_ids == (first_id, first_id + 1, first_id + 2)
    assert model.config.text_config.vocab_size == 512, "the padded vocabulary has room"
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    check_backbone(model, weights, first_id)


@pytest.mark.parametrize("room", [0, 1, 3, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_only_where_it_must(tmp_path, room, tied):
    tokens = len(tiny_tokenizer())
    weights = write_stock(tmp_path, tied=tied, vocabulary=tokens + room)
    model, processor = VReflectionForConditionalGeneration.from_backbone(tmp_path)
    rows = tokens + max(room, 3)
    assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == rows
    assert model.config.text_config.vocab_size == model.lm_head.out_features == rows
    check_backbone(model, weights, tokens)
    inputs = encode(processor, ask("Which?", picture(1))).to(model.device)
    assert (model.generate(**inputs, max_new_tokens=12, reflect=True) == tokens + 1).sum() == 8


def test_from_pretrained_takes_a_stock_folder_too(backbone, model):
    loaded = VReflectionForConditionalGeneration.from_pretrained(backbone)
    assert loaded.config.latent_token_ids == model.config.latent_token_ids
    loaded, info = VReflectionForConditionalGeneration.from_pretrained(backbone, output_loading_info=True)
    assert loaded.config.latent_token_ids == model.config.latent_token_ids
    assert all(key.startswith(("model.bcm.", "model.dac.")) for key in info["missing_keys"])
    assert not info["unexpected_keys"]


def test_new_modules_start_as_the_paper_says(backbone):
    model, _ = VReflectionForConditionalGeneration.from_backbone(backbone, dac_queries="static")
    for module in (model.model.bcm, model.model.dac):
        assert module.queries.std().item() == pytest.approx(0.02, rel=0.1)
        assert module.queries.mean().abs() < 0.002
        assert not module.is_trained
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
            assert not projection.bias.any() and projection.weight.std() > 0.01
        assert (module.norm.weight == 1).all() and not module.norm.bias.any()


@pytest.mark.parametrize("positions", [None, "none"])
def test_looks_know_where_they_are_unless_asked_not_to(backbone, tmp_path, positions):
    options = {} if positions is None else {"patch_positions": positions}
    model, _ = VReflectionForConditionalGeneration.from_backbone(backbone, **options)
    assert model.config.patch_positions == (positions or "sincos")
    model.save_pretrained(tmp_path)
    # A checkpoint keeps its own, and what is asked for stands in the config alone.
    assert (
        VReflectionForConditionalGeneration.from_pretrained(tmp_path).config.patch_positions
        == model.config.patch_positions
    )
    other = VReflectionForConditionalGeneration.from_pretrained(tmp_path, patch_positions="sincos")
    assert other.config.patch_positions == "sincos"
    assert not hasattr(other.generation_config, "patch_positions")
    assert other.generation_config.latent_feedback == "hidden"


def test_from_backbone_takes_the_number_of_latents_and_the_dtype(backbone):
    model, processor = VReflectionForConditionalGeneration.from_backbone(
        backbone, num_latent_tokens=4, dtype=torch.bfloat16
    )
    assert len(model.model.bcm.queries) == 4 and model.model.bcm.queries.dtype == torch.bfloat16
    assert model.generation_config.latent_steps == processor.num_latent_tokens == 4
    content = [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "Z"}]
    text = processor.apply_chat_template([{"role": "assistant", "content": content}], tokenize=False)
    assert text.endswith("<|sovt|>" + 4 * "<|lvr|>" + "<|eovt|>Z<|im_end|>\n")


def test_tokens_may_have_other_names(backbone, tmp_path):
    """Those of the authors' checkpoints."""
    names = ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>")
    model, processor = VReflectionForConditionalGeneration.from_backbone(backbone, names)
    processor.save_pretrained(tmp_path)
    for loaded in (processor, VReflectionProcessor.from_pretrained(tmp_path)):
        reflection = {"type": "reflection", "box": [0.0, 0.0, 0.5, 0.5]}
        messages = ask("What is <|lvr_start|>?", picture(1)) + [{"role": "assistant", "content": [reflection]}]
        inputs = encode(loaded, messages)
        ids = inputs["input_ids"][0].tolist()
        assert [ids.count(token) for token in model.config.latent_token_ids] == [1, 8, 1]
        assert inputs["boxes"].tolist() == [[[0, 0, 32768, 32768, 0]] * 8]
        assert loaded.tokenizer.convert_ids_to_tokens(model.config.latent_token_ids) == list(names)
    inputs = encode(processor, ask("What?", picture(1))).to(model.device)
    sequences = model.generate(**inputs, reflect=True, max_new_tokens=11)
    assert "<|lvr_start|>" + "<|lvr|>" * 8 + "<|lvr_end|>" in processor.decode(sequences[0])


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """A published checkpoint, whose generation config isn't the default."""
    folder = tmp_path_factory.mktemp("checkpoint")
    before = model.generation_config.latent_steps, model.generation_config.latent_feedback
    model.generation_config.latent_steps, model.generation_config.latent_feedback = 5, "dac"
    model.save_pretrained(folder)
    model.generation_config.latent_steps, model.generation_config.latent_feedback = before
    processor.save_pretrained(folder)
    return folder


def test_saved_loaded_and_saved_again_is_the_same(model, folder, tmp_path):
    loaded = VReflectionForConditionalGeneration.from_pretrained(folder).to(model.device)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.latent_token_ids == model.config.latent_token_ids
    loaded.save_pretrained(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} <= names
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert sha256(tmp_path / name) == sha256(folder / name), name


def test_saved_keys_are_those_of_the_model(model, folder):
    """A Trainer resumes with `load_state_dict(strict=False)`, which would drop renamed ones in silence."""
    saved = load_file(folder / "model.safetensors").keys()
    assert saved == model.state_dict().keys() - {"lm_head.weight"}  # tied


def test_an_untied_checkpoint_survives_too(tmp_path):
    write_stock(tmp_path / "stock", tied=False, vocabulary=len(tiny_tokenizer()) + 1)
    model, _ = VReflectionForConditionalGeneration.from_backbone(tmp_path / "stock", has_bcm=False)
    randomise(model.model.dac)
    model.save_pretrained(tmp_path / "saved")
    loaded = VReflectionForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.model.bcm is None and loaded.model.dac.is_trained
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_vocabulary_without_the_latent_tokens_is_not_saved(folder, tmp_path):
    loaded = VReflectionForConditionalGeneration.from_pretrained(folder)
    loaded.resize_token_embeddings(loaded.config.latent_start_token_id)
    with pytest.raises(ValueError, match="latent_start_token_id"):
        loaded.save_pretrained(tmp_path)


def test_a_quantised_stock_checkpoint_keeps_bcm_and_dac_whole(backbone):
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    loaded = VReflectionForConditionalGeneration.from_pretrained(backbone, **options)
    kinds = {type(module).__name__ for name, module in loaded.named_modules() if name.endswith("q_proj")}
    assert kinds == {"Linear", "Linear8bitLt"}
    assert all(type(one) is torch.nn.Linear for one in (loaded.model.bcm.q_proj, loaded.model.dac.k_proj))


def test_the_modules_of_a_checkpoint_can_be_left_out(model, folder):
    options = {"has_bcm": False, "has_dac": False, "output_loading_info": True}
    loaded, report = VReflectionForConditionalGeneration.from_pretrained(folder, **options)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    kept = {name: weight for name, weight in model.state_dict().items() if ".bcm." not in name and ".dac." not in name}
    assert loaded.state_dict().keys() == kept.keys() != model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], weight.cpu()) for name, weight in kept.items())


def test_the_generation_config_keeps_how_to_reflect(folder, backbone, stock, ids):
    loaded = VReflectionForConditionalGeneration.from_pretrained(folder)
    assert (loaded.generation_config.latent_steps, loaded.generation_config.latent_feedback) == (5, "dac")
    fresh = VReflectionForConditionalGeneration.from_pretrained(backbone)
    assert (fresh.generation_config.latent_steps, fresh.generation_config.latent_feedback) == (8, "hidden")
    for config in (fresh.generation_config, loaded.generation_config):
        assert config.eos_token_id == stock.generation_config.eos_token_id
    inputs = encode(AutoProcessor.from_pretrained(folder), ask("What?", picture(1))).to(loaded.device)
    tokens = loaded.generate(**inputs, reflect=True, max_new_tokens=12, min_new_tokens=12)
    assert (tokens == ids[1]).sum() == 5


def test_a_checkpoint_that_looks_keeps_dac(backbone, tmp_path):
    model = VReflectionForConditionalGeneration.from_pretrained(backbone, has_dac=False)
    model.generation_config.latent_feedback = "dac"
    with pytest.raises(ValueError, match="latent_feedback` is 'dac'.*has_dac=False"):
        model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without").exists()
    model.generation_config.latent_feedback = "hidden"
    model.save_pretrained(tmp_path / "without")


def test_config_holds_the_architecture_and_no_training(folder):
    config = json.loads((folder / "config.json").read_text())
    stock = Qwen2_5_VLConfig().to_dict().keys()
    ours = {
        "num_latent_tokens",
        "latent_start_token_id",
        "latent_token_id",
        "latent_end_token_id",
        "compression_num_heads",
        "region_pooling",
        "patch_positions",
        "dac_queries",
        "query_position",
        "has_bcm",
        "has_dac",
        "think_end_token_id",
    }
    assert ours <= config.keys() and config.keys() - stock - ours <= {"auto_map"}
    assert config["model_type"] == "vreflection"
    assert {value.partition(".")[0] for value in config["auto_map"].values()} == {
        "configuration_vreflection",
        "modeling_vreflection",
        "processing_vreflection",
    }


def test_prompts_are_padded_on_the_left_after_loading_too(folder):
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"


def test_where_the_package_is_installed_no_code_is_trusted(folder):
    assert type(AutoConfig.from_pretrained(folder)) is VReflectionConfig
    assert type(AutoProcessor.from_pretrained(folder)) is VReflectionProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is VReflectionForConditionalGeneration


def test_a_folder_alone_is_enough(model, processor, folder, tmp_path, ids):
    """In a process where neither the package nor the repository can be imported."""
    result = run_isolated(model, folder, tmp_path)
    inputs = encode(processor, ask("Which glyph?", picture(1)))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "reflect": True}
    expected = model.generate(**inputs, **options, latent_steps=5, latent_feedback="dac")
    assert result["tokens"][0] == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.slow
def test_a_folder_is_enough_without_torchvision(model, folder, tmp_path, ids):
    result = run_isolated(model, folder, tmp_path, "torchvision")
    assert result["tokens"][0][:7] == [ids[0], *[ids[1]] * 5, ids[2]]


def top_level_imports(statements):
    """Modules imported where the file is imported, outside `try`."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield "." * statement.level + (statement.module or "")
        elif isinstance(statement, (ast.If, ast.With, ast.For, ast.ClassDef)):
            yield from top_level_imports(statement.body)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_files_import_only_torch_transformers_and_pillow(path):
    """Each top-level import of a copied file is a requirement of whoever loads the checkpoint."""
    files = {file.stem for file in PACKAGE.glob("*.py")}
    for name in top_level_imports(ast.parse(path.read_text()).body):
        if name.startswith("."):
            assert name[1:] in files, f"{name}: `save_pretrained` copies flat files only"
        else:
            root = name.partition(".")[0]
            allowed = {"torch", "transformers"} | ({"PIL"} if path.stem == "pictures_vreflection" else set())
            assert root in allowed or root in sys.stdlib_module_names, name


def lines_of_code(path):
    """Lines of a file that hold code: without docstrings, comments and blanks."""
    tree = ast.parse(path.read_text())
    scopes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docstrings = [scope.body[0] for scope in scopes if ast.get_docstring(scope) is not None]
    inside = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in inside)


def test_the_package_is_small():
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    sizes = {path.name: lines_of_code(path) for path in PACKAGE.glob("*.py")}
    assert sum(sizes.values()) <= 1960, sizes
    assert max(sizes.values()) <= 350, sizes
    # A backbone is named where a backbone's own classes are: its config, model and processor.
    thin = {"configuration_vreflection.py", "modeling_vreflection.py", "processing_vreflection.py"}
    thin |= {"modeling_qwen3_vl_vreflection.py", "modeling_qwen3_vl_moe_vreflection.py"}
    assert {path.name for path in PACKAGE.glob("*_vreflection.py") if "Qwen" in path.read_text()} == thin
