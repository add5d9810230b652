"""Trains an arm and writes it as a checkpoint: `python -m experiments.chains.embed`, by default the embedded one.

With a GPU that takes minutes. The vision encoder stays as it is; the language model starts from `base/`.
"""

import argparse
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
    mixed = {"reflecting_rows": [phase.reflecting_rows for phase in arm.phases]} if arm.plain_rows else {}
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
            **mixed,
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


def make_checkpoint(arm: str, seed: int, run: Path, folder: Path, *options: str) -> None:
    """Trains an arm in `run`, where a later call goes on, and writes it into `folder`; `options` as of `train`."""
    train(["--arms", arm, "--seeds", str(seed), "--output", str(run), "--checkpoints", str(run), *options])
    result = json.loads((run / f"{arm}_seed{seed}.json").read_text())
    write_checkpoint(load_file(run / f"{arm}_seed{seed}" / "weights.safetensors"), result, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Other options are those of experiments.chains.train."
    )
    parser.add_argument(
        "--arm", default="path", choices=[name for name, arm in ARMS.items() if arm.decodings[0] == "dac"]
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", type=Path, default=Path("outputs/chains/embedded"), help="folder of the training")
    parser.add_argument("--folder", type=Path, default=EMBEDDED, help="where to write the checkpoint")
    given, others = parser.parse_known_args()
    make_checkpoint(given.arm, given.seed, given.run, given.folder, *others)
