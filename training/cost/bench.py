"""Trainers to compare: their models share one set of weights."""

import random
from dataclasses import dataclass, field

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.efficiency.models import draw_weights, model_on
from vreflection_hub_card.efficiency.shapes import Shape, build_config, build_processor, stock_config

from ..sft_config import VReflectionSFTConfig
from ..sft_trainer import VReflectionSFTTrainer
from .observers import CountingCollator, StepClock, StepObserver
from .samples import draw_grid, make_dataset, make_row


BATCH_SIZE = 4


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        title (`str`): What tables call it.
        options (`dict`): Fields of `VReflectionSFTConfig`; of trl's `SFTConfig` if it is `stock`.
        against (`tuple[str, ...]`): The arms that it is compared with.
        stock (`bool`): Whether trl's trainer trains the stock class.
    """

    title: str
    options: dict = field(default_factory=dict)
    against: tuple[str, ...] = ("trl_sft",)
    stock: bool = False


PLAIN = ("trl_sft", "sft")
UNTRAINED = {"stage": "2", "allow_untrained_bcm": True}
ARMS = {
    "trl_sft": Arm("trl's SFTTrainer, stock Qwen2.5-VL", against=(), stock=True),
    "trl_sft_no_checkpointing": Arm(
        "the same, no gradient checkpointing", {"gradient_checkpointing": False}, stock=True
    ),
    "sft": Arm("ours, `stage: sft`", {"stage": "sft"}),
    "stage1": Arm("ours, `stage: 1`", {"stage": "1"}, PLAIN),
    "stage2_bcm": Arm("ours, `stage: 2`, `latent_inputs: bcm`", {**UNTRAINED, "latent_inputs": "bcm"}, PLAIN),
    "stage2_dac": Arm("ours, `stage: 2`, `latent_inputs: dac`", {**UNTRAINED, "latent_inputs": "dac"}, PLAIN),
    "stage2_hidden": Arm(
        "ours, `stage: 2`, `latent_inputs: hidden`, no gradient checkpointing",
        {**UNTRAINED, "latent_inputs": "hidden", "gradient_checkpointing": False},
        ("trl_sft", "trl_sft_no_checkpointing"),
    ),
}


class Bench:
    """Builds trainers whose models share one set of random weights, and their samples.

    Args:
        shape (`Shape`): The backbone.
        device (`torch.device`): Where it runs.
        seed (`int`): Of weights and samples.
        folder (`str`): For what trainers write.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int, folder: str):
        self.shape = shape
        self.device = device
        self.seed = seed
        self.folder = folder
        self.processor = build_processor()
        self.config = build_config(shape, self.processor)
        model = draw_weights(self.config, getattr(torch, shape.dtype), device, seed)
        self.weights = model.state_dict()
        self.attention = model.config.get_text_config()._attn_implementation

    def runner(self, options: dict, stock: bool = False) -> "Runner":
        """A trainer with these options, whose model shares the weights."""
        options = {
            "output_dir": self.folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH_SIZE,
            # No state, so that no optimiser's memory and arithmetic hides what is compared.
            "optim": "sgd",
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
            **options,
        }
        rows = make_dataset(self.rows(0, 1), not stock)  # trainers want a data set at once
        if stock:
            model = model_on(self.weights, Qwen2_5_VLForConditionalGeneration, stock_config(self.config), self.device)
            model.model.visual.requires_grad_(False)
            args = SFTConfig(assistant_only_loss=True, **options)
            trainer = SFTTrainer(model, args, processing_class=self.processor, train_dataset=rows)
        else:
            model = model_on(self.weights, VReflectionForConditionalGeneration, self.config, self.device)
            args = VReflectionSFTConfig(sample_every=0, **options)
            trainer = VReflectionSFTTrainer(model, args, processing_class=self.processor, train_dataset=rows)
        return Runner(trainer, self.device)

    def rows(self, number: int, count: int) -> list[dict]:
        """The samples of a round, with pictures of one size."""
        rng = random.Random(f"{self.seed} {number}")
        return [make_row(index, (self.shape.side, self.shape.side), rng) for index in range(count)]

    def mixed_rows(self, number: int, count: int) -> list[dict]:
        """The samples of a round, with pictures as in Visual CoT."""
        rng = random.Random(f"{self.seed} mix {number}")
        return [make_row(index, draw_grid(rng, self.shape.mix_divisor), rng) for index in range(count)]


class Runner:
    """Runs a trainer an epoch at a time, with a clock and a counting collator.

    Args:
        trainer (`SFTTrainer`): The trainer.
        device (`torch.device`): Where it runs.
    """

    def __init__(self, trainer: SFTTrainer, device: torch.device):
        self.trainer = trainer
        self.device = device
        self.clock = StepClock(device)
        self.collator = trainer.data_collator = CountingCollator(trainer.data_collator)
        trainer.add_callback(self.clock)
        trainer.remove_callback(PrinterCallback)

    def run(self, dataset) -> list[dict]:
        """Trains on the data set once; `seconds` and sizes of its steps."""
        self.clock.seconds, self.collator.batches = [], []
        self.trainer.train_dataset = dataset
        self.trainer.train()
        pairs = zip(self.clock.seconds, self.collator.batches, strict=True)
        return [{"seconds": seconds, **sizes} for seconds, sizes in pairs]

    def observe(self, dataset) -> dict:
        """Trains on it once, and looks into the last step: peak memory, the largest vocabulary-wide tensor."""
        observer = StepObserver(self.device, self.trainer.model.config)
        self.trainer.add_callback(observer)
        steps = self.run(dataset)
        self.trainer.remove_callback(observer)
        return {
            "peak_memory_bytes": observer.memory.bytes,
            "largest_vocabulary_tensor": {
                "shape": observer.vocabulary.shape,
                "rows": observer.vocabulary.rows,
                "positions": steps[-1]["positions"],
            },
        }
