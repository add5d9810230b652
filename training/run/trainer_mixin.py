"""What every trainer of this project shares: saving, resuming, signals, metrics, cards."""

import math
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from modeling_vreflection.causal_lm_vreflection import MODEL_CLASSES
from vreflection_hub_card.card import save_card, write_training_facts
from vreflection_hub_card.folder_lock import locked_folder

from ..losses import latent_distance
from ..stages import STAGES
from .callbacks import PreemptionCallback, RunProgress, outlive_signals
from .checkpoint_folders import (
    check_same_settings,
    check_same_stage,
    check_space,
    find_checkpoint,
    load_progress,
    marked_incomplete,
    remove_incomplete,
    sync,
)
from .latent_metrics import LatentSpread, attention_inside, collapse_message
from .meters import Meters, sum_over_ranks
from .model_card import RunOrigin, trainer_card, trainer_facts
from .settings import run_settings


logger = logging.get_logger(__name__)

MEANS = ("loss", "latent_distance", "teacher_inside_box", "student_inside_box", "reflections", "padding")


class RunMixin:
    """Stands before one of trl's trainers among the bases of a trainer of V-Reflection.

    The trainer hands each of a collator's batches to [`~RunMixin.record`], and its own means are named in `logged_means`. Its
    configuration has a `stage`, its model no adapter yet.

    Args:
        sources (`list[dict]`, *optional*): Where `train_dataset` came from, as [`load_rows`](../data/sources.py) takes it;
            for the model card and `training_facts.json`.
        from_scratch (`bool`, *optional*, defaults to `False`): Whether the model began with random weights; likewise.
        kwargs: Arguments of trl's trainer.

    Raises:
        ValueError: Several GPUs in one process.
    """

    logged_means: tuple[str, ...] = ()

    def __init__(self, model, args, sources: list[dict] | None = None, from_scratch: bool = False, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and torch's DataParallel would cut batches apart: start with "
                "`--accelerate_config ddp_8gpu --num_processes N`, or set CUDA_VISIBLE_DEVICES=0."
            )
        self.origin = RunOrigin(model.name_or_path, sources, from_scratch)
        self._running = torch.zeros((), dtype=torch.bool).share_memory_()
        self._meters = {mode: Meters((*self.logged_means, *MEANS)) for mode in ("train", "eval")}
        self._latents_shape = (model.config.num_latent_tokens, model.config.get_text_config().hidden_size)
        self._spread = LatentSpread(*self._latents_shape)
        self._collapsed = False
        self._to_push: str | None = None
        self._skipping = 0.0  # batches of an evaluation with skipped rows
        # Where DAC doesn't train, the student is as it was drawn.
        self.watched = ("teacher", "student") if "dac" in STAGES[args.stage].trains else ("teacher",)
        self._clock = None  # when tokens were last counted, and how many there were
        super().__init__(model=model, args=args, **kwargs)
        self.progress = RunProgress(args.stage)
        self.preemption = PreemptionCallback(self.accelerator, getattr(args, "steps_between_rollouts", 1))
        self.add_callback(self.progress)
        self.add_callback(self.preemption)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """[`~transformers.Trainer.train`], which never resumes from a checkpoint that wasn't written to the end.

        Raises:
            CheckpointError: No whole checkpoint where one is asked for; one of another stage, or of other settings or data.
            InputError: Another run in the output folder.
            OSError: An output folder that can't be written, or has no room for a checkpoint.
            FloatingPointError: A gradient or weight that is not finite: nothing of it is saved.
            KeyboardInterrupt: Ctrl+C, after a checkpoint is written.
        """
        if self.args.should_save:
            check_space(self.args.output_dir, self._checkpoint_bytes())
        with locked_folder(Path(self.args.output_dir)) if self.args.should_save else nullcontext():
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs):
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        self.progress.settings = run_settings(self)
        if checkpoint is not None:
            stored = load_progress(checkpoint, type(self.progress).__name__)
            check_same_stage(checkpoint, stored["args"]["stage"], self.args.stage)
            check_same_settings(checkpoint, stored["args"].get("settings"), self.progress.settings)
            self.progress.restore(stored)
        self.accelerator.wait_for_everyone()  # all have chosen
        if self.is_world_process_zero():
            remove_incomplete(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        self._clock = (time.perf_counter(), self.progress.num_tokens)
        self._running.fill_(True)
        try:
            result = super().train(checkpoint, **kwargs)
        finally:
            self._running.fill_(False)
            self.preemption.restore_handlers()
        self.progress.gather_skipped()
        if self.is_world_process_zero() and (report := self.progress.report()):
            logger.warning(report)
        if self.preemption.requested == signal.SIGINT:
            raise KeyboardInterrupt
        return result

    def _checkpoint_bytes(self) -> int:
        """Bytes of the weights; of a checkpoint, where the run writes some, also of AdamW's two moments."""
        parameters = list(self.model.parameters())
        if is_peft_model(self.model):
            parameters = [one for one in parameters if one.requires_grad]
        weights = sum(one.numel() * one.element_size() for one in parameters)
        moments = sum(2 * one.numel() * one.element_size() for one in parameters if one.requires_grad)
        return weights + (moments if self.args.save_strategy != "no" and not self.args.save_only_model else 0)

    def _run_epoch(self, **kwargs):
        # A finished run that is resumed would train one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # A scaler, as of fp16, skips such steps itself.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of step {self.state.global_step + 1} is not finite (norm {float(norm)}): nothing of this step "
                "is saved. A smaller `learning_rate` or `max_grad_norm`, or float32 instead of bfloat16, may help."
            )
        return norm

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(outlive_signals, running=self._running, then=inner.worker_init_fn)
        return loader

    def _save(self, output_dir=None, state_dict=None):
        if self.is_fsdp_enabled and self.model.config.tie_word_embeddings:
            state_dict = {name: value for name, value in state_dict.items() if name != "lm_head.weight"}
        check_finite_weights(self.model.state_dict() if state_dict is None else state_dict)
        with self._plain_model() if self.is_fsdp_enabled else nullcontext():
            super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process gets here, also while the one that writes is still writing
            return
        folder = Path(output_dir or self.args.output_dir)
        if is_peft_model(self.model):
            from ..adapters import save_base_configs  # peft is an extra

            save_base_configs(self.model, folder)
        write_training_facts(folder, trainer_facts(self))
        if folder == Path(self.args.output_dir):
            self.create_model_card()
            sync(folder, recursive=False)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            save_card(trainer_card(self, model_name, dataset_name, tags), Path(self.args.output_dir))

    @contextmanager
    def _plain_model(self):
        """FSDP2 gives the model a class of its own, whose code isn't ours: for a while, `model` is one of our class."""
        sharded = self.model
        if not is_peft_model(sharded):
            with torch.device("meta"):
                self.model = MODEL_CLASSES[sharded.config.backbone_type](sharded.config)
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
        only_model = self.args.save_only_model
        if self.preemption.requested is not None:  # the run is to go on from here
            self.args.save_only_model = False
        try:
            self.progress.gather_skipped()
            with marked_incomplete(folder, self.args.should_save):
                self.accelerator.wait_for_everyone()  # nobody writes before the marker
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self.args.save_total_limit, self.args.save_only_model = limit, only_model
        if self._to_push is not None:
            super()._push_from_checkpoint(self._to_push)
            self._to_push = None
        if self.args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # transformers takes the weights along, and not the code that loads them
            for code in Path(checkpoint_folder).glob("*_vreflection.py"):
                shutil.copy(code, self.args.output_dir)
        self._to_push = checkpoint_folder  # when it is whole

    @torch.no_grad()
    def record(self, batch, outputs, **means):
        """Meters a batch of the collator's and counts its tokens.

        `means` are the trainer's own, by the names in `logged_means`: each a sum, and how many it is of.
        """
        training, segments = self.model.training, sum(batch["reflections"])
        mode = "train" if training else "eval"
        means["reflections"] = sum(map(bool, batch["reflections"])), len(batch["sample_ids"])
        means["padding"] = batch["input_ids"].numel() - batch["num_tokens"], batch["input_ids"].numel()
        if segments:
            if outputs.teacher_latents is not None:
                distance = latent_distance(outputs.latent_states, outputs.teacher_latents, "l1", 1)
                means["latent_distance"] = distance, segments
            maps = {name: getattr(outputs, f"{name}_attention") for name in self.watched}
            shares = {name: attention_inside(attention, outputs.inside_box) for name, attention in maps.items()}
            for name, share in shares.items():
                means[f"{name}_inside_box"] = share.sum(), segments
            if training:
                self._spread.add(outputs.latent_states)
        for name, (total, count) in means.items():
            self._meters[mode].add(name, total, count)
        if training:
            self.progress.num_tokens += int(sum_over_ranks(torch.tensor(batch["num_tokens"]), self.accelerator))
        self._skipping += bool(batch["skipped"])
        self.progress.skip(batch["skipped"])
        self._metrics[mode]["num_tokens"] = [self.progress.num_tokens]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._skipping = 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._meters["eval"].pop(self.accelerator)
        loss = means.pop("loss", None)
        # In transformers' mean a batch without a good row counts as a loss of 0.
        if sum_over_ranks(torch.tensor(self._skipping), self.accelerator):
            means |= {} if loss is None else {"loss": loss}
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._meters["train"].pop(self.accelerator))
            if "loss" in logs:
                self._log_run(logs)
        super().log(logs, start_time)

    def _log_run(self, logs: dict[str, float]):
        now = time.perf_counter()
        before, tokens = self._clock
        logs["tokens_per_second"] = (self.progress.num_tokens - tokens) / (now - before)
        self._clock = (now, self.progress.num_tokens)
        if STAGES[self.args.stage].reflects:
            spread = self._spread.value(sum_over_ranks(self._spread.sums, self.accelerator))
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


def check_finite_weights(weights: dict[str, torch.Tensor]):
    """Raises a `FloatingPointError` for weights that aren't finite."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise FloatingPointError(f"The weight {name} is not finite: nothing is saved.")
