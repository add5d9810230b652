"""Learning from questions without boxes, from a path checkpoint on: `python -m experiments.reward.without_boxes --start FOLDER`.

Each arm starts from the same weights and sees the same rows in the same order, as many a step, for as many steps. `grpo`: answers
are sampled and rewarded if exact, and gradients go through the latents; `grpo_sigma`: latents are actions instead; `grpo_constants`:
latents are constants. `sft`: plain cross-entropy, without reflections. `sft_latents`: cross-entropy of the right
answers behind the model's own reflections, whose latents are constants; `sft_through`: the same, with gradients through them.
A result file is written for each arm as it goes; a call goes on where an earlier one was stopped.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from experiments.chains.train import versions
from hub_card.evaluation.asking_rows import RowsAsker
from hub_card.evaluation.harness.answers import AnswerLog
from hub_card.evaluation.matching import Match
from hub_card.evaluation.own_rows import read_own_rows
from hub_card.evaluation.rows_accuracy import ask_and_summarise, decoding_options
from hub_card.evaluation.statistics import paired_difference, proportion
from hub_card.glyphsearch import draw_question, glyphsearch_dataset
from training import VReflectionGRPOConfig, VReflectionGRPOTrainer, VReflectionSFTConfig, VReflectionSFTTrainer
from training.loading import load_model_and_processor
from training.rewards import exact_answer

from .own_latents import OwnLatentsTrainer


LEARNERS = ("grpo", "grpo_sigma", "grpo_constants", "sft", "sft_latents", "sft_through")
RESULTS = Path(__file__).parent / "results"
FIRST_ROW = 10_000_000  # of training: behind all that any recipe or experiment has boxes of
ROWS_OF_A_SEED = 1_000_000
REPLACED = ("zeroed", "noise", "shuffled")
SAVES = 20  # steps between checkpoints
TOKENS = 14  # of an answer: a start token, eight slots, an end token, the glyph, its end, and two more


def shared_options(options: argparse.Namespace, arm: str) -> dict:
    """What the configurations of all arms have alike."""
    return {
        "output_dir": str(options.work / f"{arm}_seed{options.seed}"),
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(10, options.steps - 1),
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "seed": options.seed,
        "bf16": False,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": min(SAVES, options.steps),
        "save_total_limit": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def make_trainer(arm: str, options: argparse.Namespace):
    """The trainer of an arm."""
    model, processor = load_model_and_processor(str(options.start), dtype="float32")
    first = FIRST_ROW + ROWS_OF_A_SEED * options.seed
    count = options.steps * options.rows
    rows = glyphsearch_dataset("train", count, "chains", reflection=False, start=first)
    shared = shared_options(options, arm)
    given = {"processing_class": processor, "train_dataset": rows}
    if arm == "sft":
        more = {"stage": "sft", "train_sampling_strategy": "sequential", "sample_every": 0}
        args = VReflectionSFTConfig(**shared, **more, per_device_train_batch_size=options.rows)
        return VReflectionSFTTrainer(model, args, **given)
    rewarded = arm.startswith("grpo")
    copies = options.answers if rewarded else 2  # trl asks for two
    more = {
        "per_device_train_batch_size": options.rows * copies,
        "num_generations": copies,
        "max_completion_length": TOKENS,
        "shuffle_dataset": False,
    }
    if rewarded:
        more |= {"temperature": options.temperature, "latent_noise": options.latent_noise}
        more["latent_sigma"] = options.latent_noise if arm == "grpo_sigma" else None
        trainer = VReflectionGRPOTrainer(model, exact_answer, VReflectionGRPOConfig(**shared, **more), **given)
        trainer.through_latents = arm == "grpo"
        return trainer
    args = VReflectionGRPOConfig(**shared, **more)
    return OwnLatentsTrainer(model, exact_answer, args, **given, through=arm == "sft_through")


def test_rows(count: int) -> list[dict]:
    """Unseen scenes with one question each."""
    return list(glyphsearch_dataset("test", count, "chains", reflection=False))


def evaluate(checkpoint: Path, options: argparse.Namespace, name: str) -> tuple[dict, list[bool]]:
    """Greedy answers of a checkpoint: what `vreflection evaluate` counts as it decodes by default, how many are right if every
    answer has to begin with a reflection, and which are right by default."""
    model, processor = load_model_and_processor(str(checkpoint), dtype="float32")
    model.to(options.device).eval()
    rule, rows = Match("exact"), read_own_rows(test_rows(options.questions), Match("exact"))

    def ask(folder: str, reflect: bool | None, replaced: tuple[str, ...]) -> tuple[dict, list[bool]]:
        decoding = decoding_options(model, replaced, TOKENS, None, None, reflect)
        asked = {"checkpoint": str(checkpoint), "questions": options.questions, "decoding": decoding}
        log = AnswerLog(options.work / "answers" / folder, asked, 0)
        found = ask_and_summarise(RowsAsker(model, processor, rows, decoding, 50, log), rule, replaced)
        return found.result, [sample["verdicts"]["exact"]["correct"] for sample in found.samples]

    result, right = ask(name, None, REPLACED)
    _, made_to_reflect = ask(f"{name}_made_to_reflect", True, ())
    return {**result, "by_kind": by_kind(right), "made_to_reflect": proportion(made_to_reflect)}, right


def by_kind(right: list[bool]) -> dict:
    """The shares by kind and hops of the questions of `test_rows`."""
    groups: dict[str, list[bool]] = {}
    for index, one in enumerate(right):
        _, question = draw_question("test", index, "chains")
        groups.setdefault(f"{question.kind}, {question.hops} hops", []).append(one)
    return {name: proportion(some) for name, some in sorted(groups.items())}


def run(arm: str, options: argparse.Namespace) -> None:
    """Trains and evaluates an arm, and writes its result file."""
    name = f"{arm}_seed{options.seed}"
    path = options.output / f"{name}.json"
    settings = {key: value for key, value in vars(options).items() if key not in ("arms", "output", "work")}
    weights = (options.start / "model.safetensors").read_bytes()
    settings |= {"start": options.start.name, "start_sha256": hashlib.sha256(weights).hexdigest()}
    result = json.loads(path.read_text()) if path.exists() else {"arm": arm, "options": settings}
    if result["options"] != settings:
        raise SystemExit(f"{path} is of other options ({result['options']}): name another --output, or delete it.")
    if "after" in result:
        return
    folder = options.work / name
    begun = time.monotonic()
    if not (folder / "model.safetensors").exists():
        trainer = make_trainer(arm, options)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        if trainer.preemption.requested is not None:
            raise SystemExit(f"{name} was ended after step {trainer.state.global_step}: call again to go on.")
        trainer.save_model()
        kept = ("step", "loss", "grad_norm", "reward", "reflections", "frac_reward_zero_std", "loss_ce", "step_time")
        result["log"] = [
            {key: log[key] for key in kept if key in log} for log in trainer.state.log_history if "loss" in log
        ]
        result["seconds"] = round(time.monotonic() - begun, 1)
        result["made_with"] = versions(torch.device(options.device))
        write(path, result)
    result["before"], before = evaluate(options.start, options, "start")
    result["after"], after = evaluate(folder, options, name)
    result["gained"] = paired_difference(before, after)
    write(path, result)
    gained = result["gained"]
    print(f"{name}: {100 * sum(before) / len(before):.1f} -> {100 * sum(after) / len(after):.1f} %, gained {gained}")


def write(path: Path, result: dict) -> None:
    """Writes a result file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result) + "\n")
    path.with_suffix(".new").replace(path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder of a path checkpoint")
    parser.add_argument("--arms", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=8, help="questions a step")
    parser.add_argument("--answers", type=int, default=8, help="sampled answers of a question, for grpo")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--latent_noise", type=float, default=1.0)
    parser.add_argument("--questions", type=int, default=1000, help="unseen scenes to ask about")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("outputs/reward"), help="folder of checkpoints and answers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parse_arguments()
    for one in chosen.arms:
        run(one, chosen)
