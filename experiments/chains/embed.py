"""Trains the embedded checkpoint and writes it into `hub_card/vreflection_tiny`: `python -m experiments.chains.embed`.

With a GPU it takes minutes. Its vision encoder stays as it is; the language model starts from `base/`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hub_card.card.facts import read_training_facts, write_training_facts
from modeling_vreflection import VReflectionProcessor

from .arms import ARMS
from .network import EMBEDDED, starting_model
from .rows import QUESTIONS, RELATION_SCENE_EVERY
from .train import CLIP, OPTIMISER, WARM_UP
from .train import main as train


FOLDER = Path("outputs/chains/embedded")
ARM, SEED = "path", 1
EARLIER_RUNS = 3  # in the training facts: those that `base/` had


def write_checkpoint(weights: dict[str, torch.Tensor], result: dict, folder: Path) -> None:
    """Writes a trained arm as a checkpoint that decodes by looking, with its processor and its training facts.

    Args:
        weights (`dict[str, torch.Tensor]`): The trained weights by name, as `train` wrote them.
        result (`dict`): The run's result file.
        folder (`Path`): Where to write; it may be the embedded checkpoint's own.
    """
    arm, options = ARMS[result["arm"]], result["options"]
    model = starting_model(result["seed"], arm.patch_positions, torch.device("cpu"))
    known = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(weights) != known:
        raise ValueError(f"The weights differ from the model's trained ones in {sorted(set(weights) ^ known)}.")
    model.load_state_dict(weights, strict=False)
    model.generation_config.latent_feedback = "dac"
    facts = read_training_facts(EMBEDDED)
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    made_with = result["made_with"]
    stopped = result["steps_done"] < options["steps"]
    schedule = "cosine to 5 %" + (f" at step {options['steps']}, stopped early" if stopped else "")
    run = {
        "stage": "path",
        "title": "stage path, BCM and DAC",
        "started_from": "tiny_stage2",
        "data": [
            {"format": "glyphsearch", "split": "train", "difficulty": "chains", "count": options["scenes"]},
        ],
        "losses": {"L_feat": arm.phases[0].lambda_feat, "L_attn": arm.phases[0].lambda_attn},
        "options": {
            "latent_inputs": "bcm",
            "attention_target": arm.phases[0].attention_target,
            "latent_feedback": "dac",
            "freeze_vision": True,
            "questions_per_scene": QUESTIONS,
            "scenes_of_attributes_and_relations": f"1 in {RELATION_SCENE_EVERY}",
        },
        "optimiser": {
            "optim": "adamw_torch_fused",
            "learning_rate": options["learning_rate"],
            "lr_scheduler_type": schedule,
            "warmup_steps": WARM_UP,
            "weight_decay": OPTIMISER["weight_decay"],
            "adam_beta1": OPTIMISER["betas"][0],
            "adam_beta2": OPTIMISER["betas"][1],
            "max_grad_norm": CLIP,
        },
        "batch": {"per_device": options["batch"] * QUESTIONS, "accumulation": 1, "processes": 1},
        "precision": "float32",
        "seed": result["seed"],
        "steps": result["steps_done"],
        "machine": {"gpu": made_with["machine"]},
        "versions": {name: made_with[name] for name in ("torch", "transformers")},
    }
    write_training_facts(folder, {**facts, "runs": [*facts["runs"][:EARLIER_RUNS], run]})


if __name__ == "__main__":
    train(["--arms", ARM, "--seeds", str(SEED), "--output", str(FOLDER), "--checkpoints", str(FOLDER)])
    trained = load_file(FOLDER / f"{ARM}_seed{SEED}" / "weights.safetensors")
    write_checkpoint(trained, json.loads((FOLDER / f"{ARM}_seed{SEED}.json").read_text()), EMBEDDED)
