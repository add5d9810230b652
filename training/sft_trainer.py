"""Trains the two stages with trl: what is frozen, how the losses add up, what is logged and saved."""

import random
import shutil
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.utils import entropy_from_logits

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card import save_card, write_training_facts
from vreflection_hub_card.inference.drawing import save_figure
from vreflection_hub_card.rows import BadRow

from .collator import VReflectionDataCollator
from .data.packing import pack_dataset
from .loading import load_model_and_processor
from .losses import (
    attention_distillation_loss,
    bcm_alignment_loss,
    feature_distillation_loss,
    latent_distance,
)
from .run.callbacks import PreemptionCallback, RunProgress, outlive_sigterm
from .run.checkpoint_folders import check_same_stage, find_checkpoint, load_progress, remove_incomplete, writing
from .run.latent_metrics import LatentSpread, attention_inside, collapse_message
from .run.meters import Meters
from .run.model_card import RunOrigin, trainer_card, trainer_facts
from .run.sample_pictures import draw_sample, picture_from_patches
from .sft_config import TRAINED_MODULES, VReflectionSFTConfig


logger = logging.get_logger(__name__)

# What is logged as an exact mean: of tokens, of segments, of samples, of positions.
MEANS = (
    "loss_ce",
    "entropy",
    "mean_token_accuracy",
    "loss_bcm",
    "loss_feat",
    "loss_attn",
    "latent_distance",
    "teacher_inside_box",
    "student_inside_box",
    "reflections",
    "padding",
)
# Of a batch: for the trainer, not for the model.
FACTS = ("labels", "sample_ids", "reflections", "num_tokens", "spare", "skipped")


class VReflectionSFTTrainer(SFTTrainer):
    """trl's [`~trl.SFTTrainer`] for V-Reflection: the same arguments, with a [`VReflectionSFTConfig`] as `args`.

    Logs, beside trl's metrics: `loss_ce` (a mean over tokens); `loss_bcm`, `loss_feat` and `loss_attn` (means over
    segments, unweighted); `latent_distance`, |H - Z_T|; `teacher_inside_box` and `student_inside_box`, the share of
    attention on the box's patches; `latent_spread`, how much the states of different samples differ (see
    [`LatentSpread`](sight.py)); `reflections`, the share of samples that hold one; `padding`, the share of positions; and
    `tokens_per_second`, of all ranks, without padding. Means are exact over accumulation steps, logging steps and ranks.

    Args:
        model (`str` or `VReflectionForConditionalGeneration`): A model, or a checkpoint to load.
        args (`VReflectionSFTConfig`): The configuration.
        processing_class (`VReflectionProcessor`, *optional*): The processor; the checkpoint's, if left out.
        data_collator ([`VReflectionDataCollator`], *optional*): By default one for the stage.
        peft_config (`peft.PeftConfig`, *optional*): Adapters for the language model. What the stage trains besides, BCM,
            DAC and the latent tokens' embeddings, still trains as a whole and is saved with them.
        sources (`list[dict]`, *optional*): Where `train_dataset` came from, as [`load_rows`](data/sources.py) takes it; for
            the model card and `training_facts.json`.
        from_scratch (`bool`, *optional*, defaults to `False`): Whether the model began with random weights; likewise.
        kwargs: Further arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: A stage that the model has not the modules for; stage 2 with a BCM that was never trained; with flash
            attention, several packs in a batch.
        FloatingPointError: A loss or latent that is not finite, naming the batch's samples.
        BadRow: See [`VReflectionDataCollator`].
    """

    _tag_names = ["trl", "sft", "v-reflection"]

    def __init__(
        self,
        model,
        args: VReflectionSFTConfig | None = None,
        data_collator=None,
        processing_class=None,
        peft_config=None,
        sources: list[dict] | None = None,
        from_scratch: bool = False,
        **kwargs,
    ):
        args = VReflectionSFTConfig(output_dir="v-reflection-sft") if args is None else args
        for name in ("formatting_func", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"V-Reflection's rows and losses leave no place for `{name}`: leave it out.")
        if isinstance(model, str):
            model, loaded_processor = load_model_and_processor(model, **(args.model_init_kwargs or {}))
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        if is_peft_model(model):
            raise ValueError(
                "The model carries an adapter already: merge it (`vreflection merge ADAPTER OUTPUT`), and start from "
                "the merged checkpoint with a new `peft_config`."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and torch's DataParallel would cut batches apart: start with "
                "`--accelerate_config ddp_8gpu --num_processes N`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if args.world_size > 1 and not getattr(data_collator, "every_module", True):
            raise ValueError(
                "With several processes the collator needs `every_module=True`, or they may wait for ever."
            )
        check_stage(model, args)
        self._running = torch.zeros((), dtype=torch.bool).share_memory_()
        self.origin = RunOrigin(model.name_or_path, sources, from_scratch)
        if peft_config is None:
            freeze(model, args)
        else:
            from .adapters import complete_peft_config, prepare_adapter  # peft is an extra

            peft_config = complete_peft_config(peft_config, model, args)
        if data_collator is None:
            data_collator = VReflectionDataCollator(
                processing_class,
                model.config,
                reflect=args.stage != "sft",
                # Without a teacher the states themselves fill the slots of pass 1.
                align_segments=args.latent_inputs == "hidden" or not model.config.has_bcm,
                slot_ce=args.slot_ce,
                max_length=args.max_length,
                on_bad_row=args.on_bad_row,
                every_module=args.world_size > 1,
            )
        text_config = model.config.get_text_config()
        if (
            args.sample_packing
            and "flash" in text_config._attn_implementation
            and args.per_device_train_batch_size > 1
        ):
            raise ValueError(
                "Flash attention keeps the samples of one pack apart: set `per_device_train_batch_size=1`."
            )
        self.weights = {
            "loss_bcm": args.lambda_bcm,
            "loss_feat": args.lambda_dac * args.lambda_feat,
            "loss_attn": args.lambda_dac * args.lambda_attn,
        }
        self._meters = {mode: Meters(MEANS) for mode in ("train", "eval")}
        self._latents_shape = (model.config.num_latent_tokens, text_config.hidden_size)
        self._spread = LatentSpread(*self._latents_shape)
        self._segments_in_step = None
        self._drawn_step = None
        self._collapsed = False
        # Before stage 2 the student is as it was drawn.
        self._watched = ("teacher", "student") if "dac" in TRAINED_MODULES[args.stage] else ("teacher",)
        self._clock = None  # when tokens were last counted, and how many there were
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if peft_config is not None:
            prepare_adapter(self.model, args)
        self.progress = RunProgress(args.stage)
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.progress)
        self.add_callback(self.preemption)
        if args.sample_packing:
            self.train_dataset, skipped = pack_dataset(self.train_dataset, processing_class, args)
            self.progress.skip(skipped)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """[`~transformers.Trainer.train`], which never resumes from a checkpoint that wasn't written to the end.

        Raises:
            CheckpointError: No whole checkpoint where one is asked for; a checkpoint of another stage.
        """
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            stored = load_progress(checkpoint, type(self.progress).__name__)
            check_same_stage(checkpoint, stored["args"]["stage"], self.args.stage)
            self.progress.restore(stored)
        self.accelerator.wait_for_everyone()  # all have chosen
        if self.is_world_process_zero():
            remove_incomplete(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        self._total_train_tokens = self.progress.num_tokens
        self._clock = (time.perf_counter(), self._total_train_tokens)
        self._running.fill_(True)
        try:
            result = super().train(checkpoint, **kwargs)
        finally:
            self._running.fill_(False)
        self.progress.gather_skipped()
        if self.is_world_process_zero() and (report := self.progress.report()):
            logger.warning(report)
        return result

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(outlive_sigterm, running=self._running, then=inner.worker_init_fn)
        return loader

    def _save(self, output_dir=None, state_dict=None):
        if self.is_fsdp_enabled and self.model.config.tie_word_embeddings:
            state_dict = {name: value for name, value in state_dict.items() if name != "lm_head.weight"}
        with self._plain_model() if self.is_fsdp_enabled else nullcontext():
            super()._save(output_dir, state_dict)
        if is_peft_model(self.model) and self.args.should_save:
            from .adapters import save_base_configs

            save_base_configs(self.model, output_dir or self.args.output_dir)
        folder = Path(output_dir or self.args.output_dir)
        write_training_facts(folder, trainer_facts(self))
        if folder == Path(self.args.output_dir):
            self.create_model_card()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            save_card(trainer_card(self, model_name, dataset_name, tags), Path(self.args.output_dir))

    @contextmanager
    def _plain_model(self):
        """FSDP2 gives the model a class of its own, whose code isn't ours: for a while, `model` is one of our class."""
        sharded = self.model
        if not is_peft_model(sharded):
            with torch.device("meta"):
                self.model = VReflectionForConditionalGeneration(sharded.config)
            self.model.generation_config = sharded.generation_config
        try:
            yield
        finally:
            self.model = sharded

    def _save_checkpoint(self, model, trial):
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # An older checkpoint goes only when this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self.progress.gather_skipped()
            with writing(folder, self.args.should_save):
                self.accelerator.wait_for_everyone()  # nobody writes before the marker
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # transformers takes the weights along, and not the code that loads them
            for code in Path(checkpoint_folder).glob("*_vreflection.py"):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        segments = torch.tensor(sum(sum(batch["reflections"]) for batch in batches), device=device)
        if self.args.average_tokens_across_devices:
            segments = self.accelerator.gather(segments).sum()
        self._segments_in_step = segments.clamp(min=1)
        if batches and num_items is not None and int(num_items) == 0:
            raise BadRow("No row of this step can be trained on: `vreflection check RECIPE` says why.")
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        facts = {name: inputs[name] for name in FACTS}
        inputs = {name: value for name, value in inputs.items() if name not in FACTS}
        targets = F.pad(facts["labels"][:, 1:], (0, 1), value=-100)
        # Logits only for the columns that some row has a label in: whole-sequence logits of a 7B cost gigabytes.
        kept = (targets != -100).any(0).nonzero().flatten()
        outputs = model(
            **inputs,
            latent_inputs=self.args.latent_inputs,
            bcm_receives_ce=self.args.bcm_receives_ce,
            logits_to_keep=0 if return_outputs else kept,
            use_cache=False,
        )
        logits = outputs.logits[:, kept] if return_outputs else outputs.logits
        logits, targets = logits.flatten(0, 1), targets[:, kept].flatten()
        nll = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        tokens = (targets != -100).sum()

        training = mode == "train" and num_items_in_batch is not None
        loss = nll / (num_items_in_batch if training else tokens.clamp(min=1))
        segments, terms = sum(facts["reflections"]), {}
        if outputs.latent_states is not None:
            latents = {"H": outputs.latent_states, "Z_T": outputs.teacher_latents, "Z_S": outputs.student_latents}
            check_finite(facts["sample_ids"], **latents)
            divisor = self._segments_in_step if training else max(segments, 1)
            terms = self.latent_losses(outputs, divisor)
            # Of a spare sample nothing counts, but each module has its backward pass, as on the other ranks.
            counts = 0.0 if facts["spare"] else 1.0
            loss = loss + counts * sum(self.weights[name] * term for name, term in terms.items())
        check_finite(facts["sample_ids"], loss=loss)
        if training and self.args.average_tokens_across_devices:
            # The engines average gradients over the ranks, while the divisors count all ranks.
            loss = loss * self.accelerator.num_processes

        with torch.no_grad():
            meters, learned = self._meters[mode], targets != -100
            meters.add("loss_ce", nll, tokens)
            meters.add("entropy", entropy_from_logits(logits[learned]).sum(), tokens)
            meters.add("mean_token_accuracy", (logits.argmax(-1) == targets).sum(), tokens)
            for name, term in terms.items() if segments else ():
                meters.add(name, term * divisor, segments)
            meters.add("reflections", sum(map(bool, facts["reflections"])), len(facts["sample_ids"]))
            meters.add("padding", inputs["input_ids"].numel() - facts["num_tokens"], inputs["input_ids"].numel())
            if segments:
                self._watch(inputs, outputs, facts, mode)
        if mode == "train":
            seen = torch.tensor(facts["num_tokens"], device=loss.device)
            self.progress.num_tokens += int(self.accelerator.reduce(seen, reduction="sum"))
            self._total_train_tokens = self.progress.num_tokens
        self.progress.skip(facts["skipped"])
        self._metrics[mode]["num_tokens"] = [self.progress.num_tokens]
        return (loss, outputs) if return_outputs else loss

    def latent_losses(self, outputs, num_segments: int | torch.Tensor) -> dict[str, torch.Tensor]:
        """The stage's losses at the segments, by name, unweighted."""
        args = self.args
        losses = {}
        if args.stage in ("1", "joint"):
            losses["loss_bcm"] = bcm_alignment_loss(
                outputs.latent_states,
                outputs.teacher_latents,
                states_learn=states_learn(args.seed, self.state.global_step, args.bernoulli_p),
                alignment=args.alignment,
                distance=args.latent_loss,
                num_segments=num_segments,
            )
        if args.stage in ("2", "joint"):
            if outputs.teacher_latents is not None:
                losses["loss_feat"] = feature_distillation_loss(
                    outputs.student_latents,
                    outputs.teacher_latents,
                    distance=args.latent_loss,
                    num_segments=num_segments,
                )
            losses["loss_attn"] = attention_distillation_loss(
                outputs.student_attention,
                outputs.teacher_attention,
                temperature=args.attention_temperature,
                epsilon=args.attention_epsilon,
                num_segments=num_segments,
            )
        return losses

    def _watch(self, inputs, outputs, facts, mode: str):
        """Meters where attention falls and how far states and teacher are apart; draws a sample where one is due."""
        count = sum(facts["reflections"])
        merge = self.model.config.vision_config.spatial_merge_size
        grids = [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]
        if outputs.teacher_latents is not None:
            pair = outputs.latent_states, outputs.teacher_latents
            self._meters[mode].add("latent_distance", latent_distance(*pair, "l1", 1), count)
        for name in self._watched:
            attention = getattr(outputs, f"{name}_attention")
            if attention is not None:
                inside = attention_inside(attention, inputs["boxes"], grids)
                self._meters[mode].add(f"{name}_inside_box", inside.sum(), count)
        if mode == "train":
            self._spread.add(outputs.latent_states)
            step = self.state.global_step + 1
            due = self.args.sample_every and step % self.args.sample_every == 0 and step != self._drawn_step
            if due and self.is_world_process_zero():
                self._drawn_step = step
                self._draw(inputs, outputs, facts, grids, step)

    def _draw(self, inputs, outputs, facts, grids: list[tuple[int, int]], step: int):
        image, *box = inputs["boxes"][0].tolist()
        height, width = grids[image]
        maps = {name: getattr(outputs, f"{name}_attention") for name in self._watched}
        maps = {
            name: attention[0, :, : height * width].unflatten(1, (height, width))
            for name, attention in maps.items()
            if attention is not None
        }
        image_processor = self.processing_class.image_processor
        picture = picture_from_patches(inputs["pixel_values"], inputs["image_grid_thw"], image, image_processor)
        name = next(name for name, count in zip(facts["sample_ids"], facts["reflections"]) if count)
        folder = Path(self.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        figure = draw_sample(
            picture, box, maps.get("teacher"), maps.get("student"), f"stage {self.args.stage}, step {step}: {name}"
        )
        save_figure(figure, folder / f"step-{step}.png")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        means = self._meters[mode].pop(self.accelerator)
        logs.update({prefix + name: mean for name, mean in means.items()})
        if mode == "train" and "loss" in logs:
            self._log_run(logs)
        super().log(logs, start_time)

    def _log_run(self, logs: dict[str, float]):
        now = time.perf_counter()
        before, tokens = self._clock
        logs["tokens_per_second"] = (self.progress.num_tokens - tokens) / (now - before)
        self._clock = (now, self.progress.num_tokens)
        if self.args.stage != "sft":
            state = self._spread.state()
            if self.accelerator.num_processes > 1:
                state = self.accelerator.reduce(state.to(self.accelerator.device), reduction="sum")
            spread = self._spread.value(state)
            self._spread = LatentSpread(*self._latents_shape)
            if spread is not None:
                logs["latent_spread"] = spread
            message = collapse_message(spread, self.state.global_step)
            if message and not self._collapsed and self.is_world_process_zero():
                logger.warning(message)
            self._collapsed = message is not None
        self.progress.gather_skipped()
        if self.progress.skipped:
            logs["skipped_rows"] = len(self.progress.skipped)


def states_learn(seed: int, global_step: int, probability: float) -> bool:
    """The Bernoulli draw of Eq. 2: the same on every rank, for every micro-batch of a step, and after a resume."""
    return random.Random(f"{seed} {global_step}").random() < probability


def check_stage(model, args: VReflectionSFTConfig):
    """Raises where the model lacks what the stage needs."""
    bcm, dac = model.model.bcm, model.model.dac
    if args.stage in ("1", "joint") and bcm is None:
        raise ValueError(f"Stage {args.stage!r} trains BCM, and the model has none (`has_bcm=False`).")
    if args.stage in ("2", "joint") and dac is None:
        raise ValueError(f"Stage {args.stage!r} trains DAC, and the model has none (`has_dac=False`).")
    if args.stage == "2" and not args.allow_untrained_bcm and (bcm is None or not is_trained(bcm)):
        raise ValueError(
            "Stage 2 distils BCM, and this model's was never trained: start from a stage 1 checkpoint, or set "
            "`allow_untrained_bcm=True` for the ablation."
        )


def is_trained(bcm) -> bool:
    """Whether a BCM was ever trained, also where ZeRO-3 has spread it over the ranks."""
    gathered = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([bcm.norm.bias])
    with gathered:
        return bcm.is_trained


def freeze(model, args: VReflectionSFTConfig):
    """Sets what the stage trains: the language model; BCM in stage 1, DAC in stage 2, both jointly."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(not args.freeze_vision)
    trained = TRAINED_MODULES[args.stage]
    for name in ("bcm", "dac"):
        module = getattr(model.model, name)
        if module is not None:
            module.requires_grad_(name in trained)


def check_finite(sample_ids: list[str], **tensors: torch.Tensor | None):
    """Raises where a tensor holds NaN or infinity; nothing is ever zeroed."""
    for name, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite; the batch's samples: {', '.join(sample_ids)}.")
