"""Training beside trl's SFTTrainer on the stock Qwen2.5-VL, from the same weights: time of a step, tokens a second, memory.

`python -m experiments.benchmark.training --backbone small --output FILE`

A step is timed where it runs, in the arm's own `train()`: forward, backward, clipping and the optimiser, without reading and
collating data. In a round all arms train on the same samples, in turns, and ratios are taken within the round. Two more arms
train stage 1 on the lengths of Visual CoT, padded and packed.

The result file is written after every arm. Called again with the same options, the program adds what is missing.
"""

import argparse
import importlib.metadata
import random
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import disable_progress_bars
from peft import LoraConfig
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from vreflection_training import VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.adapters import LANGUAGE_LAYERS
from vreflection_training.data.packing import pack_dataset

from .backbones import BACKBONES, RUNNABLE, Backbone, count_parameters, model_on, random_model
from .random_rows import LIMITS, VISUAL_COT_NOTE, as_dataset, draw_grid, random_row
from .rounds import PeakMemory, open_result, paired_ratio, pick_clock, rotated, save_result, spread


BATCH_SIZE = 4
MIXED_BATCHES = 4  # of BATCH_SIZE samples each, in a round of the arms with mixed lengths
# Steps of an arm's turn that warm up, and that are timed: on a GPU the trainer empties the cache before each turn.
TURNS = {"cpu": (0, 1), "cuda": (2, 5)}


@dataclass(frozen=True)
class TrainingArm:
    """One way of training.

    `options` are fields of `VReflectionSFTConfig`, or of trl's `SFTConfig` for an arm in which trl's trainer trains the `stock`
    class; `against` names the arms that it is compared with; pictures of a `mixed` arm have Visual CoT's sizes.
    """

    title: str
    options: dict = field(default_factory=dict)
    against: tuple[str, ...] = ("trl_sft", "sft")
    stock: bool = False
    mixed: bool = False


NO_CHECKPOINTING = {"gradient_checkpointing": False}
STAGE_2 = {"stage": "2", "allow_untrained_bcm": True}
TRAININGS = {
    "trl_sft": TrainingArm("trl's SFTTrainer, stock Qwen2.5-VL", against=(), stock=True),
    "trl_sft_no_checkpointing": TrainingArm(
        "the same, no gradient checkpointing", NO_CHECKPOINTING, ("trl_sft",), stock=True
    ),
    "sft": TrainingArm("ours, `stage: sft`", {"stage": "sft"}, ("trl_sft",)),
    "path": TrainingArm("ours, `stage: path`", {"stage": "path"}),
    "stage1": TrainingArm("ours, `stage: 1`", {"stage": "1"}),
    "stage2_bcm": TrainingArm("ours, `stage: 2`, `latent_inputs: bcm`", {**STAGE_2, "latent_inputs": "bcm"}),
    "stage2_dac": TrainingArm("ours, `stage: 2`, `latent_inputs: dac`", {**STAGE_2, "latent_inputs": "dac"}),
    "stage2_hidden": TrainingArm(
        "ours, `stage: 2`, `latent_inputs: hidden`, no gradient checkpointing",
        {**STAGE_2, **NO_CHECKPOINTING, "latent_inputs": "hidden"},
        ("trl_sft", "trl_sft_no_checkpointing"),
    ),
    "padded": TrainingArm("stage 1, padded batches", {"stage": "1"}, (), mixed=True),
    "packed": TrainingArm(
        "stage 1, packs",
        {"stage": "1", "sample_packing": True, "max_samples_per_pack": BATCH_SIZE, "per_device_train_batch_size": 1},
        ("padded",),
        mixed=True,
    ),
}


class StepObserver(TrainerCallback):
    """Notes the seconds of each step, and if it is asked for the peak memory of the last one in bytes."""

    def __init__(self, device: torch.device, memory: bool):
        self.clock, self.memory = pick_clock(device)[1], PeakMemory(device) if memory else None
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.memory is not None and state.global_step == state.max_steps - 1:
            self.memory.__enter__()
        self._began = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.clock() - self._began)
        if self.memory is not None and state.global_step == state.max_steps:
            self.memory.__exit__(None, None, None)


class CountingCollator:
    """A collator that keeps the sizes of its batches: `tokens` without padding, `positions` with it, and `labels`."""

    def __init__(self, collator):
        self.collator = collator
        self.sizes: list[dict] = []

    def __call__(self, examples):
        batch = self.collator(examples)
        mask = batch.get("attention_mask")
        tokens = batch["num_tokens"] if mask is None else int(mask.sum())
        labels = int((batch["labels"] != -100).sum())
        self.sizes.append({"tokens": tokens, "positions": batch["input_ids"].numel(), "labels": labels})
        return batch


class TrainingBench:
    """Trains arms whose models share one set of random weights; `folder` is for what trainers write.

    With `lora` all arms train adapters of this rank on the linear layers of the language model, ours with what the stage
    trains besides.
    """

    def __init__(self, backbone: Backbone, device: torch.device, seed: int, folder: str, lora: int | None = None):
        self.backbone, self.device, self.seed, self.folder, self.lora = backbone, device, seed, folder, lora
        model, self.processor = random_model(backbone, device, seed)
        self.weights, self.config = model.state_dict(), model.config
        if lora is not None:  # an adapter names its base
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def trainer(self, arm: TrainingArm) -> SFTTrainer:
        """An arm's trainer, whose model shares the weights."""
        options = {
            "output_dir": self.folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH_SIZE,
            "optim": "sgd",  # without state, so that no optimiser's memory and arithmetic hides what is compared
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": True,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "max_length": None,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
            "bf16": self.device.type == "cuda",
            "dataloader_pin_memory": False,
            "seed": self.seed,
            **arm.options,
        }
        if "sample_packing" in options:
            options |= {name: limit // self.backbone.mix_divisor for name, limit in LIMITS.items()}
        model = model_on(self.weights, self.config, arm.stock)
        if arm.stock:
            model.model.visual.requires_grad_(False)
            trainer_class, args = SFTTrainer, SFTConfig(assistant_only_loss=True, **options)
        else:
            trainer_class, args = VReflectionSFTTrainer, VReflectionSFTConfig(sample_every=0, **options)
        rows = as_dataset(self.rows(arm, 0, 1), not arm.stock)  # a trainer wants a data set at once
        adapter = None
        if self.lora is not None:
            model.name_or_path = self.folder
            layers = rf"model\.language_model\..+\.({'|'.join(LANGUAGE_LAYERS)})"
            adapter = LoraConfig(r=self.lora, target_modules=layers, task_type="CAUSAL_LM")
        trainer = trainer_class(model, args, processing_class=self.processor, train_dataset=rows, peft_config=adapter)
        trainer.data_collator = CountingCollator(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def rows(self, arm: TrainingArm, number: int, count: int) -> list[dict]:
        """The samples of a round, the same for all arms with equal or with mixed lengths."""
        rng = random.Random(f"{self.seed} {'mix ' if arm.mixed else ''}{number}")
        side, divisor = self.backbone.side, self.backbone.mix_divisor
        return [random_row(draw_grid(rng, divisor) if arm.mixed else (side, side), rng) for _ in range(count)]

    def train(
        self, trainer: SFTTrainer, arm: TrainingArm, number: int, steps: int, memory: bool = False
    ) -> list[dict]:
        """Trains on the samples of a round; each step's seconds and sizes, and the last one's peak memory if it is asked for."""
        count = (MIXED_BATCHES if arm.mixed else steps) * BATCH_SIZE
        rows = as_dataset(self.rows(arm, number, count), not arm.stock)
        if "sample_packing" in arm.options:
            rows, _ = pack_dataset(rows, self.processor, trainer.args.packing_rule, seed=trainer.args.packing_seed)
        observer = StepObserver(self.device, memory)
        trainer.add_callback(observer)
        trainer.data_collator.sizes, trainer.train_dataset = [], rows
        trainer.train()
        trainer.remove_callback(observer)
        pairs = zip(observer.seconds, trainer.data_collator.sizes, strict=True)
        measured = [{"seconds": seconds, **sizes} for seconds, sizes in pairs]
        if memory:
            measured[-1]["peak_memory_bytes"] = observer.memory.bytes
        return measured


def measure_training(
    backbone: Backbone,
    device: torch.device,
    output: Path,
    *,
    command: str = "",
    repeats: int = 9,
    seed: int = 0,
    lora: int | None = None,
) -> dict:
    """Measures all arms, and writes the result file after every one.

    Args:
        backbone (`Backbone`): The backbone.
        device (`torch.device`): Where it runs.
        output (`Path`): The result file; one of the same settings is gone on with.
        command (`str`, *optional*): What a result says that it was measured by.
        repeats (`int`, *optional*, defaults to 9): Rounds that the file holds at the end.
        seed (`int`, *optional*, defaults to 0): Of weights and samples.
        lora (`int`, *optional*): The rank of adapters to train instead of all weights.

    Raises:
        ValueError: A result file of other settings.
    """
    warm_up, timed = TURNS[device.type]
    with tempfile.TemporaryDirectory() as folder:
        bench = TrainingBench(backbone, device, seed, folder, lora)
        settings = {
            "seed": seed,
            "versions": {name: importlib.metadata.version(name) for name in ("trl", "accelerate", "datasets")},
            "steps_per_turn": {"warm_up": warm_up, "timed": timed},
            "shape": asdict(backbone) | {"parameters": count_parameters(bench.weights)},
            "training": {
                "device": device.type,
                "dtype": backbone.dtype,
                "optimiser": "SGD without momentum, gradients clipped to norm 1",
                "batch_size": BATCH_SIZE,
                "lora": lora,
                "mix": VISUAL_COT_NOTE,
            },
        }
        result = open_result(output, command, device, settings)
        memory, rounds = result.setdefault("memory", {}), result.setdefault("rounds", {})
        trainers = {name: bench.trainer(arm) for name, arm in TRAININGS.items()}
        for name, arm in tqdm(TRAININGS.items(), desc="Warm-up, memory"):
            steps = bench.train(trainers[name], arm, 0, 2, memory=not arm.mixed and name not in memory)
            memory.setdefault(name, steps[-1].get("peak_memory_bytes"))
            save_result(output, result)
        for number in tqdm(range(result["repeats"], repeats), desc="Rounds"):
            for name in rotated(TRAININGS, number):
                if len(measured := rounds.setdefault(name, [])) <= number:
                    steps = bench.train(trainers[name], TRAININGS[name], number + 1, warm_up + timed)
                    measured.append(total(steps[warm_up:]))
                    save_result(output, summarise_training(result))
    return result


def total(steps: list[dict]) -> dict:
    """Sums of seconds and sizes, and the median step."""
    sums = {key: sum(step[key] for step in steps) for key in ("seconds", "tokens", "positions", "labels")}
    return sums | {"step_seconds": statistics.median(step["seconds"] for step in steps)}


def summarise_training(result: dict) -> dict:
    """Adds medians, intervals and ratios of what was measured so far; speed is the other arm's time over the arm's own.

    An arm is compared in the rounds that both arms have.
    """
    rounds, memory = result["rounds"], result["memory"]
    seconds = {name: [one["step_seconds"] for one in own] for name, own in rounds.items()}
    rates = {name: [one["tokens"] / one["seconds"] for one in own] for name, own in rounds.items()}
    result["repeats"] = min(len(rounds.get(name, ())) for name in TRAININGS)
    result["arms"] = {}
    for name, own in rounds.items():
        arm = TRAININGS[name]
        against = {}
        for other in arm.against:
            if both := min(len(own), len(rounds.get(other, ()))):
                against[other] = {
                    "speed": paired_ratio(seconds[other][:both], seconds[name][:both]),
                    "tokens_per_second": paired_ratio(rates[name][:both], rates[other][:both]),
                    "peak_memory": None if arm.mixed else memory[name] / memory[other],
                }
        tokens, positions = (sum(one[size] for one in own) for size in ("tokens", "positions"))
        result["arms"][name] = {
            "title": arm.title,
            "options": arm.options,
            "step_seconds": spread(seconds[name]),
            "tokens_per_second": spread(rates[name]),
            "padding": 1 - tokens / positions,
            "peak_memory_bytes": memory[name],
            "against": against,
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """`python -m experiments.benchmark.training`."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark.training",
        description="Measures training steps of trl's plain fine-tuning, of ours, of stage path, of stage 1 and of stage 2 "
        "with each `latent_inputs`, and packing against padding, on random weights and samples.",
    )
    parser.add_argument("--backbone", choices=RUNNABLE, default="small", help="default: small, for a CPU")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the result file")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (default: 9)")
    parser.add_argument("--device", choices=TURNS, default="cpu", help="default: cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank (default: all weights)")
    options = vars(parser.parse_args(words))
    backbone, device = BACKBONES[options.pop("backbone")], torch.device(options.pop("device"))
    disable_progress_bars()  # of measuring rows, between our own
    command = shlex.join(["python", "-m", "experiments.benchmark.training", *words])
    measure_training(backbone, device, command=command, **options)


if __name__ == "__main__":
    main()
