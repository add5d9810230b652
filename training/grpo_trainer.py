"""Learning by reward: answers are sampled with latents, and the update replays these."""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import pad

from .data.prompts import prompt_rows
from .grpo_config import VReflectionGRPOConfig
from .loading import load_model_and_processor
from .run.replay import Replay, forced_tokens
from .run.trainer_mixin import RunMixin
from .sft_trainer import check_list, freeze, processor_of


@dataclass
class Rollouts:
    """Sampled answers of a batch: the inputs of `generate`, how many pictures each row has, and what was fed (B, M + 1, D).

    The last latent of a row is of zeros: a slot in which decoding was cut was fed nothing.
    """

    inputs: dict[str, torch.Tensor]
    num_images: list[int] | None
    latents: torch.Tensor


class VReflectionGRPOTrainer(RunMixin, GRPOTrainer):
    """trl's [`~trl.GRPOTrainer`] for V-Reflection: the same arguments, with a [`VReflectionGRPOConfig`] as `args`.

    Answers are sampled with latents, which are recorded; every log-probability is computed again with the same latents in the
    slots, and equals the one that was sampled from. Tokens that decoding forces are no actions and have no loss; a start token
    that the model chose is one. Gradients reach the model, and DAC where its looks are fed, through the latents, or with
    `latent_sigma` through the latents' own log-probabilities.

    Logs, besides trl's metrics: `reflections`, the share of answers that hold one, and `tokens_per_second`, of prompts and
    answers.

    Args:
        model (`str`, `Path` or `VReflectionForConditionalGeneration`): A model, or a checkpoint to load: a folder, a Hub id, or
            `"vreflection_tiny"`, the embedded one.
        reward_funcs (`Callable` or `list[Callable]`): Rewards, such as those in [`rewards`](rewards.py).
        args (`VReflectionGRPOConfig`): The configuration.
        processing_class (`VReflectionProcessor`, *optional*): The processor; the model's checkpoint's, if left out.
        train_dataset (`Dataset`, `IterableDataset` or `list[dict]`): Rows in the project's format, whose last answer is the
            right one; boxes aren't needed. Rewards get its text as `answer`.
        eval_dataset (*optional*): Likewise, or a dict of several.
        peft_config (`peft.PeftConfig`, *optional*): As for [`VReflectionSFTTrainer`].
        kwargs: Further arguments of [`RunMixin`](run/trainer_mixin.py) and [`~trl.GRPOTrainer`].

    Raises:
        TypeError: Rows that are neither a data set nor a list of dicts.
        ValueError: No rows; a model without a checkpoint to find its processor in, with an adapter already, or that can't decode
            with the feedback; arguments that latents leave no place for.
        BadRow: See [`prompt_row`](data/prompts.py).
    """

    _tag_names = ["trl", "grpo", "v-reflection"]
    through_latents = True  # whether gradients go through them; the experiments' control has constants

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: VReflectionGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = VReflectionGRPOConfig(output_dir="v-reflection-grpo") if args is None else args
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"Answers are sampled by `generate`, in one turn, without `{name}`: leave it out.")
        if isinstance(model, (str, Path)):
            options = {"dtype": "float32", **(args.model_init_kwargs or {})}  # as trl loads a model by its name
            model, loaded_processor = load_model_and_processor(str(model), **options)
            processing_class = processing_class or loaded_processor
            args.model_init_kwargs = None
        if is_peft_model(model):
            raise ValueError(
                "The model carries an adapter already: merge it (`vreflection merge ADAPTER OUTPUT`), and start from "
                "the merged checkpoint with a new `peft_config`."
            )
        processing_class = processing_class or processor_of(model)
        decoding = model.reflection_options(latent_feedback=args.latent_feedback)
        args.latent_feedback = model.generation_config.latent_feedback = decoding.latent_feedback
        if peft_config is None:
            freeze(model, args)
        else:
            from .adapters import complete_peft_config, prepare_adapter  # peft is an extra

            peft_config = complete_peft_config(peft_config, model, args)
        # trl would load the reference again from the checkpoint's name, as a class of its own choice.
        beta, args.beta = args.beta, 0.0
        reference = copy.deepcopy(model).requires_grad_(False) if beta and peft_config is None else None
        super().__init__(
            model=model,
            args=args,
            reward_funcs=reward_funcs,
            train_dataset=prompts_of(train_dataset, "train_dataset", processing_class),
            eval_dataset=prompts_of(eval_dataset, "eval_dataset", processing_class),
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self.beta = args.beta = beta
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
        if peft_config is not None:
            prepare_adapter(self.model, args)
        # As trl does with an image's: no whole sequence may hold one that no features belong to.
        never = [*self.generation_kwargs["suppress_tokens"], model.config.video_token_id]
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = never
        self.generation_config.return_dict_in_generate = True
        self.decoding = model.reflection_options(generation_config=self.generation_config)
        room = self.decoding.latent_steps + 2
        if self.decoding.can_start and args.max_completion_length <= room:
            raise ValueError(
                f"`max_completion_length={args.max_completion_length}` leaves no room for an answer: a reflection with "
                f"{self.decoding.latent_steps} latent steps takes {room} tokens. Raise it."
            )
        self.rollouts: Rollouts | None = None  # the last batch's
        self._latents = None  # of the rows whose log-probabilities are computed
        self._uses_latents = any("latent_use" in inspect.signature(reward).parameters for reward in self.reward_funcs)

    def _prepare_reference(self, reference):
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _run_epoch(self, **kwargs):
        # trl counts micro-steps from 0 also where a run is resumed, and samples after a number of them.
        self._step = self._step or self.state.global_step * self.args.gradient_accumulation_steps
        super()._run_epoch(**kwargs)

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        # The processor takes a list for each row; trl has `None` for a row without pictures.
        return prompt_ids, images and [pictures or [] for pictures in images], fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Samples an answer for each prompt, and keeps what was fed."""
        prompts = {"input_ids": prompt_ids, "attention_mask": [[1] * len(ids) for ids in prompt_ids]}
        fills = {"input_ids": self._tokenizer.pad_token_id}
        inputs = {
            name: value
            if isinstance(value, torch.Tensor)
            else pad([torch.tensor(row) for row in value], padding_value=fills.get(name, 0), padding_side="left")
            for name, value in (prompts | multimodal_fields).items()
        }
        inputs = {name: value.to(self.accelerator.device) for name, value in inputs.items()}
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            result = model.generate(
                **inputs, generation_config=self.generation_config, latent_noise=self.args.latent_noise
            )
        answers = result.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        latents = F.pad(result.latents, (0, 0, 0, 1))
        self.rollouts = Rollouts(inputs, images and [len(pictures or ()) for pictures in images], latents)
        self._latents = latents
        return [up_to_end(answer, self.eos_token_ids) for answer in answers], None

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, _, *others = super()._generate(prompts)
        return prompt_ids, completion_ids, [self._actions(ids) for ids in completion_ids], *others

    def _actions(self, answer: list[int]) -> list[int]:
        """Which tokens of an answer have a loss: 1, or 0 where they were forced; slots have one with `latent_sigma`."""
        config = self.model.config
        actions = ~forced_tokens(torch.tensor([answer]), self.decoding, config)[0]
        if self.args.latent_sigma is not None:
            actions[:-1] |= (
                torch.tensor(answer[:-1]) == config.latent_token_id
            )  # the last one may have been fed nothing
        return actions.long().tolist()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        answers = output["completion_ids"]
        reflecting = (answers == self.model.config.latent_token_id).any(1)
        self._meters[mode].add("reflections", reflecting.sum(), len(answers))
        self.progress.num_tokens = self.state.num_input_tokens_seen
        return {**output, "latents": self.rollouts.latents}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        *_, end_id = self.model.config.latent_token_ids
        inputs = [
            {**row, "num_reflections": answer.count(end_id), "ended": answer[-1] in self.eos_token_ids}
            for row, answer in zip(inputs, completion_ids_list)
        ]
        if self._uses_latents:
            values = self._latent_use([row["answer"] for row in inputs], completion_ids_list)
            inputs = [{**row, "latent_use": value} for row, value in zip(inputs, values)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    @torch.no_grad()
    def _latent_use(self, right: list[str], answers: list[list[int]]) -> list[float]:
        """See [`latent_use`](rewards.py); `right` are the right answers' texts."""
        device, rollouts = self.accelerator.device, self.rollouts
        reflected = [self.reflection_of(answer) for answer in answers]
        told = [[*ids, self._tokenizer.eos_token_id] for ids in self._tokenizer(right)["input_ids"]]
        rows = [torch.tensor(before + after) for before, after in zip(reflected, told)]
        behind = [torch.tensor([0] * len(before) + [1] * len(after)) for before, after in zip(reflected, told)]
        mask, behind = (
            pad(values, padding_value=0, padding_side="right").to(device)
            for values in ([torch.ones_like(row) for row in rows], behind)
        )
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="right").to(device)
        joined = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
        batch = {
            name: torch.cat([value, joined[name]], 1) if name in joined else value
            for name, value in rollouts.inputs.items()
        }
        sums = []
        for latents in (rollouts.latents, torch.zeros_like(rollouts.latents)):
            self._latents = latents
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.model, **batch, logits_to_keep=ids.shape[1], num_images=rollouts.num_images,
                batch_size=self.args.per_device_train_batch_size,
            )  # fmt: skip
            sums.append((log_probs * behind).sum(1))
        self._latents = rollouts.latents
        return (sums[0] - sums[1]).tolist()

    def reflection_of(self, answer: list[int]) -> list[int]:
        """An answer's tokens up to its last whole reflection's end; none where there is none."""
        *_, end_id = self.model.config.latent_token_ids
        return answer[: len(answer) - answer[::-1].index(end_id)] if end_id in answer else []

    def _compute_loss(self, model, inputs):
        self._latents = inputs["latents"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        replay = Replay(
            model,
            self.model.config,
            self._latents,
            self.decoding,
            logits_to_keep,
            temperature=self.temperature,
            suppressed=tuple(self.generation_kwargs["suppress_tokens"]),
            sigma=self.args.latent_sigma,
            through=self.through_latents and self.args.latent_sigma is None,
        )
        return super()._get_per_token_logps_and_entropies(
            replay, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )


def prompts_of(rows, name: str, processor):
    """The rows of an argument as [`prompt_rows`](data/prompts.py) has them; a dict of several likewise."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: prompts_of(some, name, processor) for key, some in rows.items()}
    if isinstance(rows, list):
        check_list(rows, name)
    return prompt_rows(rows, processor)


def up_to_end(answer: list[int], ends: list[int]) -> list[int]:
    """An answer's tokens, up to the one that ends it."""
    length = next((place for place, token in enumerate(answer, 1) if token in ends), len(answer))
    return answer[:length]
