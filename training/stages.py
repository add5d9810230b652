"""The stages of training, one entry each: the only place that knows what a stage does."""

from dataclasses import dataclass, field


# The weights whose product a loss has.
LOSS_WEIGHTS = {
    "L_BCM": ("lambda_bcm",),
    "L_feat": ("lambda_dac", "lambda_feat"),
    "L_attn": ("lambda_dac", "lambda_attn"),
}


@dataclass(frozen=True)
class Stage:
    """What a stage does."""

    title: str  # on the model card
    trains: tuple[str, ...] = ()  # of "bcm" and "dac", besides the language model
    # What may fill the slots, the default first, and what `generate` feeds back after it: `latent_feedback` in
    # generation_config.json. Without any, reflections are left out, and the feedback stays what the model started with.
    slots: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # by default, of the losses besides cross-entropy
    attention_target: str | None = None  # what L_attn aims at by default: "teacher" (Eq. 4) or "box"
    options: tuple[str, ...] = ()  # the fields of its configuration that matter to it, for the model card

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses besides cross-entropy: "L_BCM" (Eq. 2), "L_feat" and "L_attn" (Eq. 5)."""
        return tuple(loss for loss, weights in LOSS_WEIGHTS.items() if set(weights) <= set(self.weights))

    @property
    def reflects(self) -> bool:
        """Whether reflections are trained."""
        return bool(self.slots)


L_BCM = {"lambda_bcm": 0.1}
L_DAC = {"lambda_dac": 0.1, "lambda_feat": 1.0, "lambda_attn": 1.0}
SLOTS = ("latent_inputs", "latent_loss", "slot_ce", "closing_ce")
EQ_2 = ("alignment", "bernoulli_p", "bcm_receives_ce")
EQ_4 = ("attention_target", "attention_temperature", "attention_epsilon")
ALWAYS = ("latent_feedback", "freeze_vision")

STAGES = {
    "path": Stage(
        title="stage path, BCM and DAC",
        trains=("bcm", "dac"),
        slots={"bcm": "dac", "dac": "dac"},
        weights={"lambda_dac": 1.0, "lambda_feat": 1.0, "lambda_attn": 0.1},
        attention_target="box",
        options=(*SLOTS, "dac_inputs_share", "bcm_receives_ce", *EQ_4, "allow_untrained_bcm", *ALWAYS),
    ),
    "1": Stage(
        title="stage 1, BCM",
        trains=("bcm",),
        slots={"bcm": "hidden", "hidden": "hidden"},
        weights=L_BCM,
        options=(*SLOTS, *EQ_2, *ALWAYS),
    ),
    "2": Stage(
        title="stage 2, DAC",
        trains=("dac",),
        slots={"dac": "dac", "bcm": "hidden", "hidden": "hidden"},
        weights=L_DAC,
        attention_target="teacher",
        options=(*SLOTS, *EQ_4, "allow_untrained_bcm", *ALWAYS),
    ),
    "joint": Stage(
        title="both stages at once",
        trains=("bcm", "dac"),
        slots={"dac": "dac", "bcm": "hidden", "hidden": "hidden"},
        weights={**L_BCM, **L_DAC},
        attention_target="teacher",
        options=(*SLOTS, *EQ_2, *EQ_4, *ALWAYS),
    ),
    "sft": Stage(title="plain fine-tuning", options=ALWAYS),
    "grpo": Stage(
        title="by reward (GRPO)",
        options=(
            *(
                "latent_sigma",
                "latent_noise",
                "num_generations",
                "num_iterations",
                "max_completion_length",
                "temperature",
            ),
            *("beta", "epsilon", "loss_type", "scale_rewards", "reward_weights"),
            *ALWAYS,
        ),
    ),
}
# The stage that learns by reward, with `VReflectionGRPOTrainer`; the others learn from answers, with `VReflectionSFTTrainer`.
REWARD_STAGE = "grpo"
SFT_STAGES = tuple(name for name in STAGES if name != REWARD_STAGE)
