"""The configuration of `VReflectionSFTTrainer`: trl's, and the options of V-Reflection."""

from dataclasses import dataclass, fields

from transformers.hf_argparser import HfArg
from trl import SFTConfig

from modeling_vreflection.decoding_vreflection import LATENT_FEEDBACK

from .losses import ALIGNMENTS, ATTENTION_TARGETS, DISTANCES
from .run.config_mixin import RunConfigMixin
from .stages import LOSS_WEIGHTS, REWARD_STAGE, SFT_STAGES, STAGES


ON_BAD_ROW = ("error", "skip")
PACK_LENGTH = 16_384
WEIGHTS = tuple(dict.fromkeys(name for weights in LOSS_WEIGHTS.values() for name in weights))
# Of trl's and transformers' arguments, those that would be ignored, and the values that ask for nothing.
UNSUPPORTED = {
    "completion_only_loss": (None, False),
    "dataset_kwargs": (None, {}, {"skip_prepare_dataset": True}),
    "dataset_text_field": ("text",),
    "label_smoothing_factor": (0.0,),
    "loss_type": ("nll",),
    "packing_strategy": ("bfd",),
    "pad_token": (None,),
    "pad_to_multiple_of": ("auto", None),
    "padding_free": (False,),
    "restore_callback_states_from_checkpoint": (False,),  # they are restored, and the count of tokens goes on
    "router_aux_loss_coef": (None, 0.0),
    "shuffle_dataset": (False,),
    "trust_remote_code": (False,),
    "truncation_mode": ("keep_start",),
}
WITH_OWN_RULES = ("latent_inputs", "attention_target", "dac_inputs_share")
RULES = (
    ((*WEIGHTS, "sample_every", "neftune_noise_alpha"), lambda x: x >= 0, "not be negative"),
    (("bernoulli_p",), lambda x: 0 <= x <= 1, "lie in [0, 1]"),
    (("dac_inputs_share",), lambda x: 0 < x <= 1, "lie in (0, 1]"),
    (("attention_temperature", "attention_epsilon"), lambda x: x > 0, "be above 0"),
    (
        ("max_length", "max_samples_per_pack", "long_sample_length", "packing_lookahead"),
        lambda x: x >= 1,
        "be at least 1",
    ),
)


@dataclass
class VReflectionSFTConfig(RunConfigMixin, SFTConfig):
    r"""
    Configuration of [`VReflectionSFTTrainer`]: trl's [`~trl.SFTConfig`] and the options of V-Reflection.

    Args:
        stage (`str`, *optional*, defaults to `"path"`): `"path"`: the model, BCM and DAC, slots filled with BCM's latents of
            each step's box, L = CE + λ_DAC L_DAC. The paper's two stages: `"1"`: the model and BCM, L = CE + λ_BCM L_BCM
            (Eq. 2); `"2"`: the model and DAC with BCM frozen, L = CE + λ_DAC L_DAC (Eq. 5). `"joint"`: everything at once.
            `"sft"`: plain fine-tuning, reflections are left out.
        lambda_bcm (`float`, *optional*): Weight of L_BCM. Left out, this and the next three are the stage's, see
            [`STAGES`](stages.py); the weight of a loss that the stage doesn't have can only be 0.
        lambda_dac (`float`, *optional*): Weight of L_DAC.
        lambda_feat (`float`, *optional*): Weight of the feature term in L_DAC.
        lambda_attn (`float`, *optional*): Weight of the attention term in L_DAC.
        latent_loss (`str`, *optional*, defaults to `"l1"`): Distance of Eq. 2 and 5: `"l1"` or `"mse"`.
        alignment (`str`, *optional*, defaults to `"stochastic"`): Which side learns in Eq. 2: `"stochastic"`, one side
            a step; `"symmetric"`, both, each towards a detached other; `"joint"`, both without stop-gradient.
        bernoulli_p (`float`, *optional*, defaults to `0.5`): Probability that the states learn, with
            `alignment="stochastic"`.
        bcm_receives_ce (`bool`, *optional*, defaults to `True`): Whether the cross-entropy trains BCM through the
            slots that it fills.
        latent_inputs (`str`, *optional*): What fills the slots: `"bcm"`, `"dac"` or `"hidden"`. Defaults to the
            stage's, see [`STAGES`](stages.py).
        dac_inputs_share (`float`, *optional*, defaults to `1.0`): In stage `"path"` with `latent_inputs="dac"`: the last
            share of the steps, in (0, 1], in which DAC's latents fill the slots (two passes a step; no gradient reaches
            BCM); before, BCM's do. With all steps BCM has to be trained already and stays frozen.
        latent_feedback (`str`, *optional*): What `generate` feeds back by default, written into generation_config.json:
            `"hidden"` or `"dac"`. Left out, it follows from the stage and what filled the slots, see
            [`STAGES`](stages.py); plain fine-tuning then leaves it as it was.
        attention_target (`str`, *optional*): What L_attn aims at: `"teacher"`, Â_T (Eq. 4), or `"box"`, uniform over the
            merged patches of the step's box. Defaults to the stage's.
        attention_temperature (`float`, *optional*, defaults to `1.0`): τ of Eq. 4.
        attention_epsilon (`float`, *optional*, defaults to `1e-9`): ε of Eq. 4.
        slot_ce (`bool`, *optional*, defaults to `False`): Whether the cross-entropy also supervises the slot and end
            tokens, which decoding forces.
        closing_ce (`bool`, *optional*, defaults to `False`): Whether the cross-entropy also supervises what closes: a
            reflection's end token, and the newline after the answer's `<|im_end|>`, as the released code does.
        freeze_vision (`bool`, *optional*, defaults to `True`): Whether the vision encoder and its merger stay as is.
        allow_untrained_bcm (`bool`, *optional*, defaults to `False`): Whether DAC may learn from a frozen BCM that was
            never trained, or without one: the ablations of stage 2.
        sample_packing (`bool`, *optional*, defaults to `False`): Whether several samples share a row, each with its
            own attention. `per_device_train_batch_size` then counts packs, and `max_length` is the length of a pack.
        max_samples_per_pack (`int`, *optional*, defaults to `4`): Most samples in a pack.
        long_sample_length (`int`, *optional*, defaults to `4096`): A sample with more tokens is packed alone.
        packing_lookahead (`int`, *optional*, defaults to `256`): Samples among which the best fit is looked for.
        on_bad_row (`str`, *optional*, defaults to `"error"`): What to do with an invalid row (a missing picture, a
            wrong box, too many tokens): `"error"` stops the run; `"skip"` leaves it out, and the run ends with the
            count of such rows and the first ten.
        sample_every (`int`, *optional*, defaults to `250`): Steps between two pictures of the same two training rows,
            with question, expected and own answer, and the teacher's and the student's attention, in `samples/` of the
            output folder; 0 draws none.
        predict_with_generate (`bool`, *optional*, defaults to `False`): Whether each evaluation also answers the rows'
            last questions, greedily: `eval_exact_match` as the checkpoint decodes by default, `eval_exact_match_teacher`
            with BCM's latents fed instead, `eval_exact_match_zeros` with zeros; plain fine-tuning has the first alone.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]: `max_length` is `None` (16,384 with
    > `sample_packing`), and a limit raises instead of cutting; `bf16` is on where a
    > GPU has it; `remove_unused_columns` is `False`, since the collator reads raw rows; `logging_nan_inf_filter` is `False`; `report_to` is trackio if that is installed.
    """

    stage: str = HfArg(default="path", help="Training stage.", metadata={"choices": tuple(STAGES)})
    lambda_bcm: float | None = HfArg(default=None, help="Weight of L_BCM (Eq. 2). Defaults to the stage's.")
    lambda_dac: float | None = HfArg(default=None, help="Weight of L_DAC (Eq. 5). Defaults to the stage's.")
    lambda_feat: float | None = HfArg(
        default=None, help="Weight of the feature term in L_DAC. Defaults to the stage's."
    )
    lambda_attn: float | None = HfArg(
        default=None, help="Weight of the attention term in L_DAC. Defaults to the stage's."
    )
    latent_loss: str = HfArg(default="l1", help="Distance of Eq. 2 and 5.", metadata={"choices": DISTANCES})
    alignment: str = HfArg(default="stochastic", help="Which side learns in Eq. 2.", metadata={"choices": ALIGNMENTS})
    bernoulli_p: float = HfArg(default=0.5, help="Probability that the states learn in Eq. 2.")
    bcm_receives_ce: bool = HfArg(default=True, help="Whether the cross-entropy trains BCM.")
    latent_inputs: str | None = HfArg(
        default=None, help="What fills the slots: bcm, dac or hidden. Defaults to the stage's."
    )
    dac_inputs_share: float = HfArg(
        default=1.0, help="Stage path with latent_inputs dac: the last share of the steps that fill the slots so."
    )
    latent_feedback: str | None = HfArg(
        default=None, help="What generate feeds back by default: hidden or dac. Defaults to the stage's."
    )
    attention_target: str | None = HfArg(
        default=None, help="What L_attn aims at: teacher or box. Defaults to the stage's."
    )
    attention_temperature: float = HfArg(default=1.0, help="Temperature of Eq. 4.")
    attention_epsilon: float = HfArg(default=1e-9, help="Smoothing constant of Eq. 4.")
    slot_ce: bool = HfArg(default=False, help="Supervise the slot and end tokens as well.")
    closing_ce: bool = HfArg(default=False, help="Supervise end tokens and the newline after an answer as well.")
    freeze_vision: bool = HfArg(default=True, help="Freeze the vision encoder and its merger.")
    allow_untrained_bcm: bool = HfArg(
        default=False, help="Let DAC learn from an untrained BCM or none: the ablations."
    )
    sample_packing: bool = HfArg(default=False, help="Pack several samples into a row.")
    max_samples_per_pack: int = HfArg(default=4, help="Most samples in a pack.")
    long_sample_length: int = HfArg(default=4096, help="A sample with more tokens is packed alone.")
    packing_lookahead: int = HfArg(default=256, help="Samples among which the best fit is looked for.")
    on_bad_row: str = HfArg(default="error", help="What to do with an invalid row.", metadata={"choices": ON_BAD_ROW})
    sample_every: int = HfArg(default=250, help="Steps between two pictures of attention; 0: none.")
    predict_with_generate: bool = HfArg(
        default=False, help="Answer the evaluation's questions: as decoding does, and with other latents."
    )
    report_to: None | str | list[str] = HfArg(
        default=None, help="Where to log, besides the terminal: trackio, wandb, tensorboard, none."
    )
    max_length: int | None = HfArg(
        default=None, help="Longest sample, or pack, in tokens; nothing longer is ever cut."
    )
    remove_unused_columns: bool = HfArg(default=False, help="Must stay off: the collator reads raw rows.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide non-finite losses from the log.")

    def __post_init__(self):
        self.stage = str(self.stage)  # YAML reads 1 as a number
        if self.stage == REWARD_STAGE:
            raise ValueError(f"`stage={REWARD_STAGE!r}` trains by reward: use `VReflectionGRPOConfig`.")
        stages = [name for name in STAGES if name != REWARD_STAGE]
        choices = {"stage": stages, "latent_loss": DISTANCES, "alignment": ALIGNMENTS, "on_bad_row": ON_BAD_ROW}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"`{name}` must be one of {names}, got {getattr(self, name)!r}.")
        self._resolve_stage()
        self.check_values(RULES, UNSUPPORTED)
        if self.packing or self.eval_packing:
            raise ValueError("trl's `packing` doesn't support images: set `sample_packing=True` instead.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"Rows have no lengths to sort by before they are packed or padded: `train_sampling_strategy` must be 'random' "
                f"or 'sequential', got {self.train_sampling_strategy!r}."
            )
        if self.sample_packing:
            self._check_packing()
        # The collator renders and tokenizes, pictures included; trl's own preparation doesn't support reflections.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()
        self.check_parsed()
        if self.accelerator_config.dispatch_batches:
            raise ValueError("`dispatch_batches` sends batches from rank to rank, and ours hold texts: leave it out.")
        self.accelerator_config.dispatch_batches = False  # of a stream each rank reads its own share
        if "exact_match" in (self.metric_for_best_model or "") and not self.predict_with_generate:
            raise ValueError(
                f"`metric_for_best_model={self.metric_for_best_model!r}` is measured with `predict_with_generate=True` only: set it."
            )
        if self.latent_inputs == "hidden" and self.gradient_checkpointing:
            raise ValueError(
                "`latent_inputs='hidden'` decodes with a cache, which gradient checkpointing forbids: set "
                "`gradient_checkpointing=False`."
            )

    @property
    def packing_rule(self) -> dict[str, int]:
        """The keyword arguments of [`pack_samples`](data/packing.py)."""
        return {
            "max_length": self.max_length,
            "max_samples": self.max_samples_per_pack,
            "long_length": self.long_sample_length,
            "lookahead": self.packing_lookahead,
        }

    @property
    def packing_seed(self) -> int | None:
        """Seed of the order in which samples are packed; `None`: as they come."""
        return None if self.train_sampling_strategy == "sequential" else self.seed

    @property
    def trains(self) -> tuple[str, ...]:
        """Of "bcm" and "dac" those that train: the stage's, but for a BCM that no gradient would ever reach."""
        stage = STAGES[self.stage]
        fills = self.latent_inputs == "bcm" or (self.latent_inputs == "dac" and self.dac_inputs_share < 1)
        reached = "L_BCM" in stage.losses or (fills and self.bcm_receives_ce)
        return tuple(name for name in stage.trains if name != "bcm" or reached)

    @property
    def distils_frozen_bcm(self) -> bool:
        """Whether the run needs a BCM that is trained already."""
        return "dac" in self.trains and "bcm" not in self.trains

    def latent_inputs_at(self, global_step: int, max_steps: int) -> str | None:
        """What fills the slots in a step, counted from 0: the same on every rank and after a resume."""
        last = max(round(self.dac_inputs_share * max_steps), 1)
        if self.latent_inputs == "dac" and max_steps - global_step > last:
            return "bcm"
        return self.latent_inputs

    def _resolve_stage(self):
        """Fills what was left out with the stage's, and raises for what the stage doesn't have."""
        stage = STAGES[self.stage]
        for name in WEIGHTS:
            given = getattr(self, name)
            if given is None:
                setattr(self, name, stage.weights.get(name, 0.0))
            elif given > 0 and name not in stage.weights:
                raise ValueError(
                    f"`stage={self.stage!r}` has no loss that `{name}` weighs: leave it out, got {given}."
                )
        self._choose("latent_inputs", tuple(stage.slots), next(iter(stage.slots), None), "slots to fill")
        self._choose(
            "attention_target", stage.attention_target and ATTENTION_TARGETS, stage.attention_target, "L_attn"
        )
        self._choose("latent_feedback", LATENT_FEEDBACK, stage.slots.get(self.latent_inputs), "")
        read_by_some = {name for one in SFT_STAGES for name in STAGES[one].options}
        for option in fields(self):
            given = getattr(self, option.name)
            if option.name in read_by_some.difference(stage.options, WITH_OWN_RULES) and given != option.default:
                raise ValueError(f"`stage={self.stage!r}` doesn't use `{option.name}`: leave it out, got {given!r}.")
        if self.dac_inputs_share != 1 and (self.stage, self.latent_inputs) != ("path", "dac"):
            raise ValueError(
                "`dac_inputs_share` says how many steps of stage 'path' fill the slots with DAC's latents: set "
                f"`latent_inputs='dac'` there, or leave it out, got {self.dac_inputs_share}."
            )

    def _choose(self, name: str, allowed: tuple[str, ...] | None, default: str | None, needed: str):
        """Fills a field that was left out, and raises for a value that isn't allowed, or where nothing is."""
        given = getattr(self, name)
        if given is None:
            setattr(self, name, default)
        elif not allowed:
            raise ValueError(f"`stage={self.stage!r}` has no {needed}: leave `{name}` out.")
        elif given not in allowed:
            names = " or ".join(map(repr, allowed))
            raise ValueError(f"In stage {self.stage} `{name}` must be {names}, got {given!r}.")

    def _check_packing(self):
        if self.latent_inputs == "hidden":
            raise ValueError("`latent_inputs='hidden'` decodes sample by sample: set `sample_packing=False`.")
        if self.max_length is None:
            self.max_length = PACK_LENGTH
