"""The configuration of `VReflectionGRPOTrainer`: trl's, and the options of V-Reflection."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg
from trl import GRPOConfig

from modeling_vreflection.decoding_vreflection import LATENT_FEEDBACK

from .run.config_mixin import RunConfigMixin
from .stages import REWARD_STAGE


# Of trl's and transformers' arguments, those that would be ignored, and the values that ask for nothing.
UNSUPPORTED = {
    "cast_lm_head_to_fp32": (False,),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "restore_callback_states_from_checkpoint": (False,),  # they are restored, and the count of tokens goes on
    "router_aux_loss_coef": (None, 0.0),
    "sync_ref_model": (False,),
    "train_sampling_strategy": ("random",),  # trl's is `shuffle_dataset`
    "trust_remote_code": (False,),
}
RULES = (
    (("latent_sigma",), lambda x: x > 0, "be above 0"),
    (("latent_noise", "beta", "epsilon"), lambda x: x >= 0, "not be negative"),
    (("temperature",), lambda x: x > 0, "be above 0"),
    (("max_completion_length", "num_iterations"), lambda x: x >= 1, "be at least 1"),
)


@dataclass
class VReflectionGRPOConfig(RunConfigMixin, GRPOConfig):
    r"""
    Configuration of [`VReflectionGRPOTrainer`]: trl's [`~trl.GRPOConfig`] and the options of V-Reflection.

    `generation_kwargs` may hold arguments of the model's `generate`, such as `latent_steps` or `reflect`.

    Args:
        stage (`str`, *optional*, defaults to `"grpo"`): Training by reward: the only stage with this configuration.
        latent_feedback (`str`, *optional*): What sampled answers feed back, `"hidden"` or `"dac"`; written into
            generation_config.json. Left out, the model's own default.
        latent_sigma (`float`, *optional*): σ of latents as Gaussian actions around what the model would feed, h: the
            log-probability of a latent z is -|z - h|² / (2 σ²), the mean over D. Slots are then learned like tokens. Left out,
            gradients of the answer's tokens go through the latents instead.
        latent_noise (`float`, *optional*): Standard deviation of the noise that is added to sampled answers' latents. Left
            out, `latent_sigma`, or 0 without it. Where it is 0, the first update from a rollout moves nothing by
            `latent_sigma`: z is h.
        freeze_vision (`bool`, *optional*, defaults to `True`): Whether the vision encoder and its merger stay as is.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]: `bf16` is on where a GPU has it;
    > `logging_nan_inf_filter` is `False`; `report_to` is trackio if that is installed. Steps of saving must be those after
    > which new answers are sampled.
    """

    stage: str = HfArg(default=REWARD_STAGE, help="Training by reward.", metadata={"choices": (REWARD_STAGE,)})
    latent_feedback: str | None = HfArg(
        default=None, help="What sampled answers feed back: hidden or dac. Defaults to the model's."
    )
    latent_sigma: float | None = HfArg(default=None, help="Standard deviation of latents as Gaussian actions.")
    latent_noise: float | None = HfArg(
        default=None, help="Standard deviation of the noise on sampled latents. Defaults to latent_sigma, or 0."
    )
    freeze_vision: bool = HfArg(default=True, help="Freeze the vision encoder and its merger.")
    report_to: None | str | list[str] = HfArg(
        default=None, help="Where to log, besides the terminal: trackio, wandb, tensorboard, none."
    )
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide non-finite losses from the log.")

    def __post_init__(self):
        if self.stage != REWARD_STAGE:
            raise ValueError(
                f"`stage` must be {REWARD_STAGE!r}, got {self.stage!r}: other stages take `VReflectionSFTConfig`."
            )
        if self.latent_feedback not in (None, *LATENT_FEEDBACK):
            names = " or ".join(map(repr, LATENT_FEEDBACK))
            raise ValueError(f"`latent_feedback` must be {names}, got {self.latent_feedback!r}.")
        if "latent_feedback" in (self.generation_kwargs or {}):
            raise ValueError("Set `latent_feedback` itself, not in `generation_kwargs`.")
        if self.use_vllm:
            raise ValueError(
                "`use_vllm=True`: vLLM doesn't return the latents that it fed, and without them no update can compute the "
                "log-probabilities of what was sampled. Leave it out: `generate` samples."
            )
        if self.use_transformers_continuous_batching or self.use_transformers_paged:
            raise ValueError(
                "`use_transformers_continuous_batching=True`: continuous batching can't carry latents from step to step. Leave "
                "it out: `generate` samples."
            )
        self.check_values(RULES, UNSUPPORTED)
        self.router_aux_loss_coef = 0.0
        if self.latent_noise is None:
            self.latent_noise = self.latent_sigma or 0.0
        super().__post_init__()
        self.check_parsed()
        micro_steps = self.steps_per_generation * self.num_iterations
        if micro_steps % self.gradient_accumulation_steps and self.gradient_accumulation_steps % micro_steps:
            raise ValueError(
                f"`steps_per_generation` x `num_iterations` is {micro_steps}, and `gradient_accumulation_steps` "
                f"{self.gradient_accumulation_steps}: one must divide the other, or answers are sampled in the middle of a step."
            )
        every = self.steps_between_rollouts
        if self.save_strategy == "steps" and every > 1 and self.save_steps % every:
            raise ValueError(
                f"New answers are sampled every {every} steps (`steps_per_generation` x `num_iterations` micro-steps, of which a "
                f"step has `gradient_accumulation_steps`), and a checkpoint between can't be resumed exactly: `save_steps` must "
                f"be a multiple of it, got {self.save_steps:g}."
            )

    @property
    def steps_between_rollouts(self) -> int:
        """The steps after which new answers are sampled, at least one."""
        return max(1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)

    @property
    def trains(self) -> tuple[str, ...]:
        """Of "bcm" and "dac" those that train: DAC, where its looks are fed."""
        return ("dac",) if self.latent_feedback == "dac" else ()
