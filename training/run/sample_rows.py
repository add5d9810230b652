"""The training rows that a run draws again and again: what the model is asked, what it should say, says, and where it looks."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from vreflection_hub_card.inference.attention_maps import GREEDY
from vreflection_hub_card.inference.encoding import answer_texts
from vreflection_hub_card.rows import row_messages

from ..collator import NON_MODEL_KEYS, VReflectionDataCollator
from ..stages import STAGES
from .exact_match import count_reflections, split_at_last_turn
from .latent_metrics import attention_inside
from .sample_pictures import save_sample


SAMPLE_ROWS = 2
LOOKED_THROUGH = 256
MORE_TOKENS = 64  # than the expected answer has


class SampleCallback(TrainerCallback):
    """Draws the same rows every `sample_every` steps, `samples/step-N-row-K.png`: the first ones that reflect.

    They are taken from `rows`, in their order before shuffling and packing, so that a resumed run draws them, too.

    Args:
        trainer (`RunMixin`): The trainer.
        rows (`Iterable[dict]`): Its training rows.
    """

    def __init__(self, trainer, rows):
        self.trainer = trainer
        self.rows = rows
        # FSDP and ZeRO-3 run a model on all ranks at once, and can't decode.
        self.sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self._chosen = None

    def on_step_end(self, args, state, control, **kwargs):
        if not args.sample_every or state.global_step % args.sample_every or not STAGES[args.stage].reflects:
            return
        if not self.sharded and not self.trainer.is_world_process_zero():
            return
        if self._chosen is None:
            self._chosen = choose_rows(self.rows, self._collator())
        model = self.trainer.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.trainer.accelerator.autocast():
                for number, (row, batch) in enumerate(self._chosen, 1):
                    self._draw(row, batch, f"step-{state.global_step}-row-{number}.png")
        finally:
            model.train(training)

    def _collator(self) -> VReflectionDataCollator:
        return VReflectionDataCollator(
            self.trainer.processing_class,
            self.trainer.model.config,
            slot_ce=True,  # whole turns are labelled
            max_length=self.trainer.args.max_length,
            on_bad_row="skip",
        )

    def _draw(self, row: dict[str, Any], batch: dict[str, Any], name: str):
        trainer, args, step = self.trainer, self.trainer.args, self.trainer.state.global_step
        processor, model = trainer.processing_class, trainer.model
        inputs = {key: value.to(args.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        known = {key: value for key, value in inputs.items() if key not in NON_MODEL_KEYS}
        filled = args.latent_inputs_at(step - 1, trainer.state.max_steps)
        run = trainer.model_wrapped if self.sharded else model
        outputs = run(**known, latent_inputs=filled, logits_to_keep=1, use_cache=False)
        prompts, turns = split_at_last_turn(inputs, processor.tokenizer.pad_token_id)
        answer = "(not decoded, since each rank holds a part of the weights)"
        if not self.sharded:
            room = len(turns[0]) + MORE_TOKENS
            tokens = model.generate(**prompts, **GREEDY, max_new_tokens=room, use_cache=True)
            tokens = tokens[:, prompts["input_ids"].shape[1] :]
            answer = answer_texts(processor, tokens)[0] or "(an empty answer)"
            if tokens.shape[1] == room:
                answer += f" … (not ended after {room} tokens)"
        if not trainer.is_world_process_zero():
            return
        maps = {name: getattr(outputs, f"{name}_attention") for name in trainer.watched}
        shares = {name: attention_inside(attention, outputs.inside_box)[0].item() for name, attention in maps.items()}
        said = [
            f"stage {args.stage}, step {step}: {batch['sample_ids'][0]}",
            f"Question: {question(row)}",
            f"Expected: {answer_texts(processor, turns)[0]}",
            f"Answer: {answer}",
        ]
        path = Path(args.output_dir) / "samples" / name
        save_sample(path, batch, maps, shares, model.config, processor.image_processor, said)


def choose_rows(rows, collator: VReflectionDataCollator) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first rows that are good and reflect, each with the batch that the collator makes of it alone."""
    chosen = []
    for row in islice(iter(rows), LOOKED_THROUGH):
        if count_reflections(row) and any((batch := collator([row]))["reflections"]):
            chosen.append((row, batch))
        if len(chosen) == SAMPLE_ROWS:
            break
    return chosen


def question(row: dict[str, Any]) -> str:
    """The text of a row's last question."""
    asked = [message for message in row_messages(row) if message["role"] == "user"]
    return " ".join(part["text"] for part in asked[-1]["content"] if part["type"] == "text") if asked else ""
