"""Records what `generate` answers, for [`compare_served`]: `python -m experiments.serving.record_answers FOLDER`.

Runs in the project's own environment. The folder gets a checkpoint and an adapter where one is made for the comparison, the
pictures, `cases.json` and `latents.safetensors`.
"""

import json
import sys
from itertools import count
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card import checkpoint_folder
from vreflection_hub_card.glyphsearch import draw_chain
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn
from vreflection_training.tiny import save_tiny_backbone


MOST_TOKENS = 40
SCENES = 8
# Scenes of a question, by index; several pictures share a prompt, and one picture two questions.
PICTURES = [[index] for index in range(SCENES)] + [[0, 1], [2, 3, 2], [4], [5, 0]]
# Width and height of the pictures that are not as they were drawn; none is larger, and one prompt holds several sizes.
SIZES = {1: (112, 168), 3: (112, 112), 6: (168, 84)}


def request_options(feedback: str) -> list[dict]:
    """What requests of one server may ask for, in turns; bias makes answers hold several reflections, or one."""
    options = [{}, {"reflect": True}, {"latent_steps": 3, "reflect": True}, {"reflect": False}]
    if feedback == "dac":
        options += [
            {"latent_tolerance": 0.3, "reflect": True},
            {"latent_tolerance": 0.05, "latent_steps": 12, "reflect": True},
        ]
    return options


def record(model, processor, feedback: str, folder: Path, several: bool) -> None:
    """Asks all questions and writes what was answered, fed and how likely it was."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [draw_chain("test", index) for index in range(SCENES)]
    pictures = [scene.image.resize(SIZES.get(index, scene.image.size)) for index, (scene, _) in enumerate(scenes)]
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    options = request_options(feedback)
    asked = [(indices, options[number % len(options)], 0.0) for number, indices in enumerate(PICTURES)]
    asked += [([number], options[(number + 3) % len(options)], 0.0) for number in range(SCENES)]
    start, _, end = model.config.latent_token_ids
    cases, latents = [], {}

    def ask(indices, given, bias):
        # Two questions: so the answer crosses from one block of vLLM's cache (32 tokens) into the next.
        question = f"{scenes[indices[-1] - 1][1].text} {scenes[indices[-1]][1].text}"
        inputs = encode_prompts(processor, [user_turn([pictures[index] for index in indices], question)], "cpu")
        result = model.generate(
            **inputs,
            **given,
            latent_feedback=feedback,
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
            sequence_bias={(start,): bias} if bias else None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        scores = [step[0].float().log_softmax(-1) for step in result.scores]
        case = {
            "pictures": indices,
            "question": question,
            "options": {name: int(value) if isinstance(value, bool) else value for name, value in given.items()},
            "bias": bias,
            "tokens": tokens,
            "text": processor.decode(tokens, skip_special_tokens=True),
            "logprobs": [float(step[token]) for step, token in zip(scores, tokens)],
            "margins": [float(step.topk(2).values.diff().abs()) for step in scores],
            "reflections": tokens.count(end),
        }
        return case, result.latents[0]

    for indices, given, bias in asked:
        case, fed = ask(indices, given, bias)
        latents[str(len(cases))] = fed.contiguous()
        cases.append(case)
    # A bias for the start token that makes the answer hold several reflections and words between them.
    for indices in [[0], [2], [6]] if several else []:
        for bias in (step / 2 for step in count(1)):
            case, fed = ask(indices, {"latent_steps": 3}, bias)
            if case["reflections"] >= 2 or bias > 20:
                break
        latents[str(len(cases))] = fed.contiguous()
        cases.append(case)
    save_file(latents, folder / "latents.safetensors")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    fields = {"feedback": feedback, "most_tokens": MOST_TOKENS, "versions": versions, "cases": cases}
    (folder / "cases.json").write_text(json.dumps(fields, indent=1))
    print(f"{folder}: {len(cases)} answers with {sum(case['reflections'] for case in cases)} reflections")


def random_checkpoint(folder: Path, model_type: str) -> Path:
    """A checkpoint of random weights, so strong that what is said depends on what is fed."""
    torch.manual_seed(0)
    backbone, checkpoint = folder / "backbone", folder / "checkpoint"
    save_tiny_backbone(backbone, model_type=model_type)
    stock = AutoModelForImageTextToText.from_pretrained(backbone, dtype=torch.float32)
    with torch.no_grad():
        for parameter in stock.model.language_model.layers.parameters():
            if parameter.ndim >= 2:
                parameter *= 1.4
    stock.save_pretrained(backbone)
    model, processor = VReflectionForConditionalGeneration.from_backbone(backbone, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.dac.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    return checkpoint


def add_adapter(model, folder: Path):
    """An adapter of random weights on the language model's linear layers, and the model with it."""
    targets = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def main(folder: Path) -> None:
    tiny = checkpoint_folder()
    for feedback in ("dac", "hidden"):
        model, processor = load_checkpoint(tiny, device="cpu", dtype=torch.float32)
        record(model, processor, feedback, folder / f"tiny_{feedback}", several=True)
    adapted = add_adapter(model, folder / "adapter")
    record(adapted, processor, "dac", folder / "adapter_dac", several=False)
    checkpoint = random_checkpoint(folder / "qwen3_vl", "qwen3_vl")
    for feedback in ("dac", "hidden"):
        model, processor = load_checkpoint(checkpoint, device="cpu", dtype=torch.float32)
        record(model, processor, feedback, folder / f"qwen3_vl_{feedback}", several=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
