"""Trains the two stages with trl: what is frozen, how the losses add up, what is logged."""

import random

import torch
import torch.nn.functional as F
from trl import SFTTrainer

from .collator import VReflectionDataCollator
from .configs import VReflectionSFTConfig
from .loading import load_model_and_processor
from .losses import attention_distillation_loss, bcm_alignment_loss, feature_distillation_loss


# What is logged as an exact mean: of tokens, and of segments.
MEANS = ("loss_ce", "entropy", "mean_token_accuracy", "loss_bcm", "loss_feat", "loss_attn")


class VReflectionSFTTrainer(SFTTrainer):
    """trl's [`~trl.SFTTrainer`] for V-Reflection: the same arguments, with a [`VReflectionSFTConfig`] as `args`.

    Logs, beside trl's metrics, `loss_ce` (a mean over tokens), `loss_bcm`, `loss_feat` and `loss_attn` (means over
    segments): unweighted, exact over accumulation steps, logging steps and ranks.

    Args:
        model (`str` or `VReflectionForConditionalGeneration`): A model, or a checkpoint to load.
        args (`VReflectionSFTConfig`): The configuration.
        processing_class (`VReflectionProcessor`, *optional*): The processor; the checkpoint's, if left out.
        data_collator ([`VReflectionDataCollator`], *optional*): By default one for the stage.
        kwargs: Further arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: A stage that the model has not the modules for; stage 2 with a BCM that was never trained.
        FloatingPointError: A loss or latent that is not finite, naming the batch's samples.
    """

    _tag_names = ["trl", "sft", "v-reflection"]

    def __init__(
        self, model, args: VReflectionSFTConfig | None = None, data_collator=None, processing_class=None, **kwargs
    ):
        args = VReflectionSFTConfig(output_dir="v-reflection-sft") if args is None else args
        if isinstance(model, str):
            model, loaded_processor = load_model_and_processor(model, **(args.model_init_kwargs or {}))
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        check_stage(model, args)
        freeze(model, args)
        if data_collator is None:
            data_collator = VReflectionDataCollator(
                processing_class,
                model.config,
                reflect=args.stage != "sft",
                align_segments=args.latent_inputs == "hidden",
                slot_ce=args.slot_ce,
                max_length=args.max_length,
            )
        # Sums and counts for exact means: {mode: {name: [sum, count]}}.
        self._sums = {mode: {name: [0.0, 0] for name in MEANS} for mode in ("train", "eval")}
        self._segments_in_step = None
        self.weights = {
            "loss_bcm": args.lambda_bcm,
            "loss_feat": args.lambda_dac * args.lambda_feat,
            "loss_attn": args.lambda_dac * args.lambda_attn,
        }
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        segments = torch.tensor(sum(len(batch.get("boxes", ())) for batch in batches), device=device)
        if self.args.average_tokens_across_devices:
            segments = self.accelerator.gather(segments).sum()
        self._segments_in_step = segments.clamp(min=1)
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = dict(inputs)
        sample_ids, labels = inputs.pop("sample_ids"), inputs.pop("labels")
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
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
        targets = targets[:, kept]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
        tokens = (targets != -100).sum()

        training = mode == "train" and num_items_in_batch is not None
        loss = nll / (num_items_in_batch if training else tokens.clamp(min=1))
        terms = {}
        if outputs.latent_states is not None:
            segments = len(outputs.latent_states)
            check_finite(sample_ids, H=outputs.latent_states, Z_T=outputs.teacher_latents, Z_S=outputs.student_latents)
            terms = self.latent_losses(outputs, self._segments_in_step if training else segments)
            loss = loss + sum(self.weights[name] * term for name, term in terms.items())
        check_finite(sample_ids, loss=loss)
        if training and self.args.average_tokens_across_devices:
            # The engines average gradients over the ranks, while the divisors count all ranks.
            loss = loss * self.accelerator.num_processes

        with torch.no_grad():
            log_probs = logits.float().log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)[targets != -100].sum()
            self._add(mode, "loss_ce", nll, tokens)
            self._add(mode, "entropy", entropy, tokens)
            self._add(mode, "mean_token_accuracy", (logits.argmax(-1) == targets).sum(), tokens)
            for name, term in terms.items():
                divisor = self._segments_in_step if training else segments
                self._add(mode, name, term * divisor, segments)
        if mode == "train":
            seen = inputs["attention_mask"].sum()
            self._total_train_tokens += self.accelerator.gather_for_metrics(seen).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
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

    def _add(self, mode: str, name: str, total: torch.Tensor, count: int | torch.Tensor):
        self._sums[mode][name][0] += float(total)
        self._sums[mode][name][1] += int(count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        # Every rank brings the same names in the same order, also where its own batches had no segment.
        sums = torch.tensor(list(self._sums[mode].values()), dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")
        prefix = "eval_" if mode == "eval" else ""
        logs.update({prefix + name: (total / count).item() for name, (total, count) in zip(MEANS, sums) if count > 0})
        self._sums[mode] = {name: [0.0, 0] for name in MEANS}
        super().log(logs, start_time)


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
    if args.stage == "2" and not args.allow_untrained_bcm and (bcm is None or not bcm.is_trained):
        raise ValueError(
            "Stage 2 distils BCM, and this model's was never trained: start from a stage 1 checkpoint, or set "
            "`allow_untrained_bcm=True` for the ablation."
        )


def freeze(model, args: VReflectionSFTConfig):
    """Sets what the stage trains: the language model; BCM in stage 1, DAC in stage 2, both jointly."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(not args.freeze_vision)
    trained = {"sft": (), "1": ("bcm",), "2": ("dac",), "joint": ("bcm", "dac")}[args.stage]
    for name in ("bcm", "dac"):
        module = getattr(model.model, name)
        if module is not None:
            module.requires_grad_(name in trained)


def check_finite(sample_ids: list[str], **tensors: torch.Tensor | None):
    """Raises where a tensor holds NaN or infinity; nothing is ever zeroed."""
    for name, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite; the batch's samples: {', '.join(sample_ids)}.")
