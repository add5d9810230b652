"""One process of several runs: `torchrun distributed_worker.py SPECS.json`."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from PIL import Image
from run_helpers import Rows
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_training import (
    VReflectionGRPOConfig,
    VReflectionGRPOTrainer,
    VReflectionSFTConfig,
    VReflectionSFTTrainer,
)
from vreflection_training.loading import build_tiny, load_model_and_processor


def rows():
    """Scenes, between them a row without a box and one without a picture: each alone on its rank for a step."""
    scenes = [dict(row) for row in glyphsearch_dataset("train", 6)]
    said = {"role": "assistant", "content": [{"type": "text", "text": "red circle"}]}
    seen = [{"type": "image"}, {"type": "text", "text": "Which glyph?"}]
    image = Image.new("RGB", (84, 56), "red")
    no_box = {"id": "no box", "images": [image], "messages": [{"role": "user", "content": seen}, said]}
    asked = [{"type": "text", "text": "Which glyph is on the cross?"}]
    no_picture = {"id": "no picture", "images": [], "messages": [{"role": "user", "content": asked}, said]}
    return [scenes[0], no_box, no_picture, scenes[1], scenes[2], scenes[3], no_picture, no_box]


def length_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def run(spec):
    if spec["options"].get("stage") == "grpo":
        return run_by_reward(spec)
    args = VReflectionSFTConfig(
        max_steps=4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **spec["options"],
    )
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:  # accelerate has FSDP for accelerators alone; the code behind it runs on a CPU as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model, processor = load_model_and_processor(spec["checkpoint"], dtype="float32")
    held_out = Rows(rows()[:5]) if args.eval_strategy != "no" else None
    trainer = VReflectionSFTTrainer(
        model, args, processing_class=processor, train_dataset=Rows(rows()), eval_dataset=held_out
    )
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    if sharded:
        assert isinstance(trainer.model_wrapped, FSDPModule)
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        Path(args.output_dir, "history.json").write_text(json.dumps(trainer.state.log_history))


class SeededTrainer(VReflectionGRPOTrainer):
    """Samples each answer by itself, from a seed that depends on its question and number, not on the rank."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        answers, latents = [], []
        for row, ids in enumerate(prompt_ids):
            fields = {name: value[row * len(value) // len(prompt_ids) :] for name, value in multimodal_fields.items()}
            fields = {name: value[: len(multimodal_fields[name]) // len(prompt_ids)] for name, value in fields.items()}
            torch.manual_seed(2 * sum(ids) + row % 2)
            found, _ = super()._generate_single_turn([ids], images[row : row + 1], fields, *args, **kwargs)
            answers += found
            latents.append(self.rollouts.latents[0])
        self._latents = pad_sequence(latents, batch_first=True)
        self.rollouts = replace(self.rollouts, latents=self._latents)
        return answers, None


def run_by_reward(spec):
    """An update; the answers of different lengths, some longer than others, lie on different ranks."""
    args = VReflectionGRPOConfig(
        max_steps=1,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={"reflect": True},
        **spec["options"],
    )
    model, processor = load_model_and_processor(spec["checkpoint"], dtype="float32")
    trainer = SeededTrainer(
        model, length_reward, args, processing_class=processor, train_dataset=glyphsearch_dataset("train", 4, "chains")
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        Path(args.output_dir, "history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        run(spec)
    if "ACCELERATE_USE_FSDP" not in os.environ:
        build_tiny(0)  # `from_scratch`: each rank has a folder of its own, and finds the weights in it
