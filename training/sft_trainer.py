"""The method: what each stage trains, and how its losses add up."""

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.utils import entropy_from_logits

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.rows import BadRow

from .collator import NON_MODEL_KEYS, VReflectionDataCollator
from .data.numbered_rows import number_rows
from .data.packing import pack_dataset
from .loading import load_model_and_processor, load_processor
from .losses import latent_losses
from .run.exact_match import count_exact_matches, exact_match_ways, share_of_rank
from .run.meters import sum_over_ranks
from .run.sample_rows import SampleCallback
from .run.trainer_mixin import RunMixin
from .sft_config import VReflectionSFTConfig
from .stages import STAGES


logger = logging.get_logger(__name__)

MOST_BAD_BATCHES = 1000  # of a stream, one after the other


class VReflectionSFTTrainer(RunMixin, SFTTrainer):
    """trl's [`~trl.SFTTrainer`] for V-Reflection: the same arguments, with a [`VReflectionSFTConfig`] as `args`.

    Logs, besides trl's metrics: `loss_ce` (a mean over tokens); `loss_bcm`, `loss_feat` and `loss_attn` (means over
    segments, unweighted); `latent_distance`, |H - Z_T|; `teacher_inside_box` and `student_inside_box`, the share of
    attention on the box's patches; `latent_spread`, how much the states of different samples differ (see
    [`LatentSpread`](run/latent_metrics.py)); `reflections`, the share of samples that hold one; `padding`, the share of
    positions; and `tokens_per_second`, of all ranks, without padding. Means are exact over accumulation steps, logging
    steps and ranks; in an evaluation on several ranks, rows that fill up the last batches count twice, as in transformers'
    `eval_loss`. With `predict_with_generate`, each evaluation also has the shares of exact answers.

    Args:
        model (`str`, `Path` or `VReflectionForConditionalGeneration`): A model, or a checkpoint to load: a folder, a Hub id, or
            `"vreflection_tiny"`, the embedded one.
        args (`VReflectionSFTConfig`): The configuration.
        data_collator ([`VReflectionDataCollator`], *optional*): By default one for the stage.
        processing_class (`VReflectionProcessor`, *optional*): The processor; the model's checkpoint's, if left out.
        train_dataset (`Dataset`, `IterableDataset` or `list[dict]`): Rows in the project's format.
        eval_dataset (*optional*): Likewise, or a dict of several.
        peft_config (`peft.PeftConfig`, *optional*): Adapters for the language model. BCM and DAC, as far as the stage trains
            them, and the latent tokens' embeddings still train as a whole and are saved with the adapters.
        kwargs: Further arguments of [`RunMixin`](run/trainer_mixin.py) and [`~trl.SFTTrainer`].

    Raises:
        TypeError: Rows that are neither a data set nor a list of dicts.
        ValueError: No rows; a model without a checkpoint to find its processor in; a stage whose modules the model lacks; a frozen BCM that was never trained; a feedback that the model
            can't decode with; with flash attention, several packs in a batch; `predict_with_generate` where each rank
            holds a part of the weights.
        FloatingPointError: A loss or latent that is not finite, naming the batch's samples.
        BadRow: See [`VReflectionDataCollator`].
    """

    _tag_names = ["trl", "sft", "v-reflection"]
    logged_means = ("loss_ce", "entropy", "mean_token_accuracy", "loss_bcm", "loss_feat", "loss_attn")

    def __init__(
        self,
        model,
        args: VReflectionSFTConfig | None = None,
        data_collator=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = VReflectionSFTConfig(output_dir="v-reflection-sft") if args is None else args
        for name in ("formatting_func", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"V-Reflection's rows and losses leave no place for `{name}`: leave it out.")
        listed = {
            name: rows for name in ("train_dataset", "eval_dataset") if isinstance(rows := kwargs.get(name), list)
        }
        for name, rows in listed.items():
            check_list(rows, name)
        if isinstance(model, (str, Path)):
            options = {"dtype": "float32", **(args.model_init_kwargs or {})}  # as trl loads a model by its name
            model, loaded_processor = load_model_and_processor(str(model), **options)
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        check_model(model, args)
        if processing_class is None:
            processing_class = processor_of(model)
        if args.world_size > 1 and not getattr(data_collator, "every_module", True):
            raise ValueError("With several processes the collator needs `every_module=True`, or they may deadlock.")
        stage = STAGES[args.stage]
        if args.latent_feedback is not None:
            set_feedback(model, args)
        if peft_config is None:
            freeze(model, args)
        else:
            from .adapters import complete_peft_config, prepare_adapter  # peft is an extra

            peft_config = complete_peft_config(peft_config, model, args)
        if data_collator is None:
            data_collator = VReflectionDataCollator(
                processing_class,
                model.config,
                reflect=stage.reflects,
                # Without a teacher the states themselves fill the slots of pass 1.
                align_segments=args.latent_inputs == "hidden" or not model.config.has_bcm,
                slot_ce=args.slot_ce,
                closing_ce=args.closing_ce,
                max_length=args.max_length,
                on_bad_row=args.on_bad_row,
                every_module=args.world_size > 1,
            )
        self._segments_in_step = None
        if "train_dataset" in listed:  # trl looks at its columns, and at nothing else
            kwargs["train_dataset"] = Dataset.from_dict({"images": [None]})
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        rows = listed.get("train_dataset", self.train_dataset)
        self.add_callback(SampleCallback(self, rows))
        if isinstance(rows, IterableDataset):
            # To transformers all steps of a stream are one epoch, of which a resumed run skips the batches that it has seen.
            rows = rows.repeat(None)
        self.train_dataset = number_rows(rows)
        self.eval_dataset = number_rows(self.eval_dataset)
        if args.predict_with_generate and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "`predict_with_generate` decodes on each rank by itself, which FSDP and ZeRO-3 don't allow: leave it out, and "
                "ask the saved checkpoint."
            )
        if peft_config is not None:
            prepare_adapter(self.model, args)
        if args.sample_packing:
            self.train_dataset, skipped = pack_dataset(
                rows,
                processing_class,
                args.packing_rule,
                reflect=stage.reflects,
                on_bad_row=args.on_bad_row,
                num_proc=args.dataset_num_proc,
                seed=args.packing_seed,
            )
            self.progress.skip(skipped)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts the segments of the whole optimiser step, by which Eq. 2 and 5 are divided, as CE is by its tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_items is not None and int(num_items) == 0:
            self.progress.skip([message for batch in batches for message in batch["skipped"]])
            batch = self._next_good_batch(epoch_iterator)
            batches, num_items = super().get_batch_samples(iter([batch]), 1, device)
        segments = torch.tensor(sum(sum(batch["reflections"]) for batch in batches), device=device)
        if self.args.average_tokens_across_devices:
            segments = self.accelerator.gather(segments).sum()
        self._segments_in_step = segments.clamp(min=1)
        return batches, num_items

    def _next_good_batch(self, epoch_iterator):
        """A batch for a step of which no row can be trained on; of rows with numbers its place depends on the step alone, so
        that a resumed run takes the same."""
        rows = self.train_dataset
        if hasattr(rows, "__len__"):
            first = self.state.global_step * self.args.world_size + self.args.process_index
            others = (self.data_collator([rows[(first + number) % len(rows)]]) for number in range(len(rows)))
        else:
            others = islice(epoch_iterator, MOST_BAD_BATCHES)
        for batch in others:
            if batch["sample_ids"]:
                return batch
            self.progress.skip(batch["skipped"])
        raise BadRow(
            "No row can be trained on, or of a stream none in 1000 batches: `vreflection check RECIPE` lists the reasons."
        )

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.predict_with_generate:
            matches = self._exact_match(dataloader.dataset)
            output.metrics.update({f"{metric_key_prefix}_{way}": share for way, share in matches.items()})
        return output

    def _exact_match(self, rows) -> dict[str, float]:
        """The shares of exact answers, over all ranks; each asks its part of the rows."""
        reflects, ranks = STAGES[self.args.stage].reflects, self.accelerator.num_processes
        collator = VReflectionDataCollator(
            self.processing_class,
            self.model.config,
            reflect=reflects,
            slot_ce=True,
            max_length=self.args.max_length,
            on_bad_row=self.args.on_bad_row,
        )
        rows = rows.dataset if isinstance(rows, IterableDatasetShard) else rows
        with self.accelerator.autocast():
            right, count = count_exact_matches(
                self.model,
                collator,
                share_of_rank(rows, self.accelerator.process_index, ranks),
                exact_match_ways(self.model, reflects),
                batch_size=self.args.per_device_eval_batch_size,
                device=self.accelerator.device,
            )
        sums = torch.tensor([*right.values(), count], dtype=torch.float64)
        *right_of_all, count_of_all = sum_over_ranks(sums, self.accelerator).tolist()
        return {way: number / count_of_all for way, number in zip(right, right_of_all)} if count_of_all else {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """L = CE + λ_BCM L_BCM + λ_DAC L_DAC, as far as the stage has them."""
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        # Logits only for the columns that some row has a label in: whole-sequence logits of a 7B cost gigabytes.
        kept = (targets != -100).any(0).nonzero().flatten()
        step = self.state.global_step
        latent_inputs = self.args.latent_inputs_at(step, self.state.max_steps)
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS},
            latent_inputs=latent_inputs,
            bcm_receives_ce=self.args.bcm_receives_ce,
            logits_to_keep=0 if return_outputs else kept,
            use_cache=False,
        )
        logits = outputs.logits[:, kept] if return_outputs else outputs.logits
        logits, targets = logits.flatten(0, 1), targets[:, kept].flatten()
        nll = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")

        tokens, segments = (targets != -100).sum(), sum(inputs["reflections"])
        num_tokens, num_segments = tokens.clamp(min=1), max(segments, 1)
        if training := self.model.training and num_items_in_batch is not None:
            num_tokens, num_segments = num_items_in_batch, self._segments_in_step
        loss, terms = nll / num_tokens, {}
        if outputs.latent_states is not None:
            weighted, terms = latent_losses(outputs, self.args, global_step=step, num_segments=num_segments)
            if latent_inputs == "dac" and "bcm" in self.args.trains:
                # No gradient may reach BCM in this step, and DDP waits for one of every parameter: this one is zero.
                weighted = weighted + 0.0 * outputs.teacher_latents.float().sum()
            # A dummy row has zero weight, but each module has its backward pass, so that ranks stay in step.
            loss = loss + (0.0 if inputs["dummy"] else 1.0) * weighted
        latents = {"Z_T": outputs.teacher_latents, "H": outputs.latent_states, "Z_S": outputs.student_latents}
        check_finite(inputs["sample_ids"], **latents, loss=loss)
        if training and self.args.average_tokens_across_devices:
            # The engines average gradients over the ranks, while the divisors count all ranks.
            loss = loss * self.accelerator.num_processes

        rows = len(inputs["sample_ids"])
        with torch.no_grad():
            learned = targets != -100
            self.record(
                inputs,
                outputs,
                loss_ce=(nll, tokens),
                entropy=(entropy_from_logits(logits[learned]).sum(), tokens),
                mean_token_accuracy=((logits.argmax(-1) == targets).sum(), tokens),
                **{f"loss_{name[2:].lower()}": (term * num_segments, segments) for name, term in terms.items()},
                **({} if self.model.training else {"loss": (loss * rows, rows)}),
            )
        return (loss, outputs) if return_outputs else loss


def check_list(rows: list, name: str):
    """Raises where a list isn't one of rows."""
    if not rows:
        raise ValueError(f"`{name}` is an empty list.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TypeError(f"`{name}[{number}]` must be a row, a dict with `messages`, got `{type(row).__name__}`.")


def processor_of(model) -> VReflectionProcessor:
    """The processor in the checkpoint that a model was loaded from; raises where there is none."""
    if not model.name_or_path:
        raise ValueError(
            "The model was not loaded from a checkpoint, where its processor would be: give a `processing_class`."
        )
    revision = getattr(model.config, "_commit_hash", None) or "main"
    return load_processor(model.name_or_path, revision, num_latent_tokens=model.config.num_latent_tokens)


def check_model(model, args: VReflectionSFTConfig):
    """Raises where the model isn't one that the stage, or the packing, can train."""
    if is_peft_model(model):
        raise ValueError(
            "The model carries an adapter already: merge it (`vreflection merge ADAPTER OUTPUT`), and start from "
            "the merged checkpoint with a new `peft_config`."
        )
    for name in args.trains:
        if getattr(model.model, name) is None:
            raise ValueError(
                f"Stage {args.stage!r} trains {name.upper()}, and the model has none (`has_{name}=False`)."
            )
    bcm = model.model.bcm
    if args.distils_frozen_bcm and not args.allow_untrained_bcm and (bcm is None or not is_trained(bcm)):
        first = "1" if args.stage == "2" else args.stage  # which trains BCM
        raise ValueError(
            f"Stage {args.stage} distils a frozen BCM, and this model's was never trained: start from a stage {first} "
            "checkpoint, or set `allow_untrained_bcm=True` for the ablation."
        )
    flash = "flash" in model.config.get_text_config()._attn_implementation
    if args.sample_packing and flash and args.per_device_train_batch_size > 1:
        raise ValueError("Flash attention keeps the samples of one pack apart: set `per_device_train_batch_size=1`.")


def set_feedback(model, args: VReflectionSFTConfig):
    """Writes into the generation config how the checkpoint decodes by default; raises where it couldn't."""
    stage = STAGES[args.stage]
    chosen = {"latent_feedback": args.latent_feedback}
    if stage.reflects:
        chosen["latent_steps"] = model.config.num_latent_tokens
    try:
        model.reflection_options(**chosen)
    except ValueError as error:
        raise ValueError(
            f"Stage {args.stage!r} would write `latent_feedback={args.latent_feedback!r}` into generation_config.json, and "
            f"the model can't decode so: {error}"
        ) from error
    for name, value in chosen.items():
        setattr(model.generation_config, name, value)
    usual = stage.slots.get(args.latent_inputs)
    if args.latent_feedback != usual:
        logger.info(
            f"`latent_feedback={args.latent_feedback!r}`, as set, goes into generation_config.json, and not "
            + (f"{usual!r}, which the stage and what fills the slots would write." if usual else "the model's own.")
        )


def is_trained(bcm) -> bool:
    """Whether a BCM was ever trained, also where ZeRO-3 has spread it over the ranks."""
    if not is_deepspeed_zero3_enabled():
        return bcm.is_trained
    import deepspeed

    with deepspeed.zero.GatheredParameters([bcm.norm.bias]):
        return bcm.is_trained


def freeze(model, args: VReflectionSFTConfig):
    """Sets what the stage trains: the language model, and BCM and DAC as far as they train."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(not args.freeze_vision)
    for name in ("bcm", "dac"):
        module = getattr(model.model, name)
        if module is not None:
            module.requires_grad_(name in args.trains)


def check_finite(sample_ids: list[str], **tensors: torch.Tensor | None):
    """Raises where a tensor holds NaN or infinity; nothing is ever zeroed."""
    for name, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite; the batch's samples: {', '.join(sample_ids)}.")
