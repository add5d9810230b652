"""The stages of training, one entry each: the only place that knows what a stage does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What a stage does."""

    title: str  # on the model card
    trains: tuple[str, ...] = ()  # of "bcm" and "dac", besides the language model
    latent_inputs: tuple[str, ...] = ()  # what may fill the slots, the default first; without any, reflections go
    losses: tuple[str, ...] = ()  # besides cross-entropy: "L_BCM" (Eq. 2), "L_feat" and "L_attn" (Eq. 5)
    options: tuple[str, ...] = ()  # the fields of `VReflectionSFTConfig` that matter to it, for the model card
    # What `generate` feeds back by default, written into generation_config.json; `None` keeps what the model started with.
    latent_feedback: str | None = None

    @property
    def reflects(self) -> bool:
        """Whether reflections are trained."""
        return bool(self.latent_inputs)

    @property
    def distils_frozen_bcm(self) -> bool:
        """Whether the stage needs a BCM that is trained already."""
        return "dac" in self.trains and "bcm" not in self.trains


SLOTS = ("latent_inputs", "latent_loss", "slot_ce")
EQ_2 = ("alignment", "bernoulli_p", "bcm_receives_ce")
EQ_4 = ("attention_temperature", "attention_epsilon")

STAGES = {
    "sft": Stage(title="plain fine-tuning", options=("freeze_vision",)),
    "1": Stage(
        title="stage 1, BCM",
        trains=("bcm",),
        latent_inputs=("bcm", "hidden"),
        losses=("L_BCM",),
        options=(*SLOTS, *EQ_2, "freeze_vision"),
    ),
    "2": Stage(
        title="stage 2, DAC",
        trains=("dac",),
        latent_inputs=("dac", "bcm", "hidden"),
        losses=("L_feat", "L_attn"),
        options=(*SLOTS, *EQ_4, "allow_untrained_bcm", "freeze_vision"),
    ),
    "joint": Stage(
        title="both stages at once",
        trains=("bcm", "dac"),
        latent_inputs=("dac", "bcm", "hidden"),
        losses=("L_BCM", "L_feat", "L_attn"),
        options=(*SLOTS, *EQ_2, *EQ_4, "freeze_vision"),
    ),
}
