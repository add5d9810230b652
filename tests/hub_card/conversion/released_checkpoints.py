"""Checkpoints of the authors' released layout, made by torch's own modules under their names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vreflection_hub_card.glyphsearch import make_scene
from vreflection_training.tiny import tiny_backbone


NAMES = ["<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>"]
FIELDS = ["lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id"]
WIDTH, STEPS, HEADS = 192, 8, 3  # a head for every 64 dimensions, as theirs have


class Resampler(nn.Module):
    """The parameters of `BoxGuidedCompression` and, without queries, of `DynamicAutoregressiveCompression`."""

    def __init__(self, queries: bool):
        super().__init__()
        if queries:
            self.queries = nn.Parameter(torch.randn(1, STEPS, WIDTH))
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.0, batch_first=True)
        self.output_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        with torch.no_grad():  # torch starts them as zeros and ones
            for vector in (self.cross_attn.in_proj_bias, self.cross_attn.out_proj.bias, self.output_norm.bias):
                vector.normal_()
            self.output_norm.weight.uniform_(0.5, 1.5)


def released_modules() -> dict[str, Resampler]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return {"box_feature_resampler": Resampler(True), "student_resampler": Resampler(False)}


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen2.5-VL's key names before transformers 4.52."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in weights.items()
    }


def flatten(config: dict) -> dict:
    """config.json as it was before transformers 4.52: the language model's fields are not in a section of their own."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"]
    config = {**text, **config, "torch_dtype": config.pop("dtype"), "rope_theta": rope["rope_theta"]}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"] = {**config["vision_config"], "model_type": "qwen2_5_vl"}
    return config


def write(folder, *, kind="released", legacy=False, tied=False, shards=3, vocabulary=None, dtype=torch.float32):
    """Writes a checkpoint and returns its weights as they are stored.

    `kind`: `"released"` has both modules, `"stage1"` the first alone, `"lvr"` none but the tokens, `"stock"` nothing.
    """
    folder = Path(folder)
    model, tokenizer, image_processor = tiny_backbone()
    config = model.config
    config.tie_word_embeddings, config.dtype = tied, dtype
    config.text_config.vocab_size = vocabulary or config.text_config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = type(model)(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if legacy:
        weights = rename(weights)
    count = {"released": 2, "stage1": 1}.get(kind, 0)
    for name, module in list(released_modules().items())[:count]:
        weights |= {f"{name}.{leaf}": tensor.detach() for leaf, tensor in module.state_dict().items()}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    for part in (config, tokenizer, image_processor, model.generation_config):
        part.save_pretrained(folder)
    if kind != "stock":
        for name in NAMES:
            tokenizer.add_tokens(name, special_tokens=True)
        tokenizer.save_pretrained(folder)
        ids = dict(zip(FIELDS, tokenizer.convert_tokens_to_ids(NAMES)))
        extra = {"architectures": ["QwenWithLVR"], "lvr_head": False, "latent_end_token": False, "loss_lvr_fct": "mse"}
        extra |= {"use_box_feature_resampler": count > 0, "use_stage2_distillation": count > 1}
        config = json.loads((folder / "config.json").read_text())
        extra["text_config"] = {**config["text_config"], "use_cache": False}
        edit(folder, **ids, **extra, **({"num_latent_tokens": STEPS} if count else {}))
    if legacy:
        path = folder / "config.json"
        path.write_text(json.dumps(flatten(json.loads(path.read_text()))))
    save_shards(folder, weights, shards)
    return weights


def edit(folder, **fields):
    """Changes fields of config.json; `None` removes one."""
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def save_shards(folder, weights, shards=1):
    """Writes weights into that many files, dealt out in turn, so that neighbours lie apart."""
    folder = Path(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    files = {f"model-{number + 1:05d}-of-{shards:05d}.safetensors": names[number::shards] for number in range(shards)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def encode(processor, question="Which glyph?", *answer):
    """Model inputs of a question about a scene, a prompt unless an answer's parts are given."""
    content = [{"type": "image", "image": make_scene(1).image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": list(answer)})
    return processor.apply_chat_template(
        messages, add_generation_prompt=not answer, tokenize=True, return_dict=True, return_tensors="pt"
    )
