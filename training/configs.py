"""What a training run is told: the loss options beside trl's, and what to load."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .losses import ALIGNMENTS, DISTANCES


STAGES = ("sft", "1", "2", "joint")
# What fills the slots: stage 1 Z_T, stage 2 DAC's output (Alg. 1).
LATENT_INPUTS_OF_STAGE = {"sft": None, "1": "bcm", "2": "dac", "joint": "dac"}
LATENT_INPUTS = ("bcm", "dac", "hidden")


@dataclass
class VReflectionSFTConfig(SFTConfig):
    r"""
    Configuration of [`VReflectionSFTTrainer`]: trl's [`~trl.SFTConfig`] and the options of V-Reflection.

    Args:
        stage (`str`, *optional*, defaults to `"1"`):
            `"sft"`: plain fine-tuning, reflections are left out. `"1"`: the model and BCM, L = CE + λ_BCM L_BCM (Eq. 2).
            `"2"`: the model and DAC with BCM frozen, L = CE + λ_DAC L_DAC (Eq. 5). `"joint"`: everything at once.
        lambda_bcm (`float`, *optional*, defaults to `0.1`):
            Weight of L_BCM.
        lambda_dac (`float`, *optional*, defaults to `0.1`):
            Weight of L_DAC.
        lambda_feat (`float`, *optional*, defaults to `1.0`):
            Weight of the feature term in L_DAC.
        lambda_attn (`float`, *optional*, defaults to `1.0`):
            Weight of the attention term in L_DAC.
        latent_loss (`str`, *optional*, defaults to `"l1"`):
            Distance of Eq. 2 and 5: `"l1"` or `"mse"`.
        alignment (`str`, *optional*, defaults to `"stochastic"`):
            Who learns in Eq. 2: `"stochastic"`, one side a step; `"symmetric"`, both, each towards a detached other;
            `"joint"`, both without stop-gradient.
        bernoulli_p (`float`, *optional*, defaults to `0.5`):
            Probability that the states learn, with `alignment="stochastic"`.
        bcm_receives_ce (`bool`, *optional*, defaults to `True`):
            Whether the cross-entropy trains BCM through the slots that it fills.
        latent_inputs (`str`, *optional*):
            What fills the slots: `"bcm"`, `"dac"` or `"hidden"`. Defaults to `"bcm"` in stage 1, else to `"dac"`.
        attention_temperature (`float`, *optional*, defaults to `1.0`):
            τ of Eq. 4.
        attention_epsilon (`float`, *optional*, defaults to `1e-9`):
            ε of Eq. 4.
        slot_ce (`bool`, *optional*, defaults to `False`):
            Whether the cross-entropy also supervises the slot and end tokens, which decoding forces.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            Whether the vision encoder and its merger stay as they are.
        allow_untrained_bcm (`bool`, *optional*, defaults to `False`):
            Whether stage 2 may run with a BCM that was never trained, or without one: the ablations.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]: `max_length` is `None`, and a limit raises
    > instead of cutting; `remove_unused_columns` is `False`, since the collator reads raw rows;
    > `logging_nan_inf_filter` is `False`.
    """

    stage: str = field(default="1", metadata={"help": "Training stage.", "choices": STAGES})
    lambda_bcm: float = field(default=0.1, metadata={"help": "Weight of L_BCM (Eq. 2)."})
    lambda_dac: float = field(default=0.1, metadata={"help": "Weight of L_DAC (Eq. 5)."})
    lambda_feat: float = field(default=1.0, metadata={"help": "Weight of the feature term in L_DAC."})
    lambda_attn: float = field(default=1.0, metadata={"help": "Weight of the attention term in L_DAC."})
    latent_loss: str = field(default="l1", metadata={"help": "Distance of Eq. 2 and 5.", "choices": DISTANCES})
    alignment: str = field(default="stochastic", metadata={"help": "Who learns in Eq. 2.", "choices": ALIGNMENTS})
    bernoulli_p: float = field(default=0.5, metadata={"help": "Probability that the states learn in Eq. 2."})
    bcm_receives_ce: bool = field(default=True, metadata={"help": "Whether the cross-entropy trains BCM."})
    latent_inputs: str | None = field(
        default=None, metadata={"help": "What fills the slots: bcm, dac or hidden. Defaults to the stage's."}
    )
    attention_temperature: float = field(default=1.0, metadata={"help": "Temperature of Eq. 4."})
    attention_epsilon: float = field(default=1e-9, metadata={"help": "Smoothing constant of Eq. 4."})
    slot_ce: bool = field(default=False, metadata={"help": "Supervise the slot and end tokens as well."})
    freeze_vision: bool = field(default=True, metadata={"help": "Freeze the vision encoder and its merger."})
    allow_untrained_bcm: bool = field(
        default=False, metadata={"help": "Let stage 2 run with an untrained BCM or none: the ablations."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sample in tokens; a longer one is an error, never cut."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads raw rows."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})

    def __post_init__(self):
        self.stage = str(self.stage)  # YAML reads 1 as a number
        choices = {
            "stage": STAGES,
            "latent_loss": DISTANCES,
            "alignment": ALIGNMENTS,
            "latent_inputs": (None, *LATENT_INPUTS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(choice) for choice in allowed)
                raise ValueError(f"`{name}` must be one of {names}, got {getattr(self, name)!r}.")
        for name in ("lambda_bcm", "lambda_dac", "lambda_feat", "lambda_attn"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.bernoulli_p <= 1:
            raise ValueError(f"`bernoulli_p` must lie in [0, 1], got {self.bernoulli_p}.")
        for name in ("attention_temperature", "attention_epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.stage == "sft" and self.latent_inputs is not None:
            raise ValueError("`stage='sft'` has no slots to fill: leave `latent_inputs` out.")
        if self.latent_inputs is None:
            self.latent_inputs = LATENT_INPUTS_OF_STAGE[self.stage]
        if self.stage == "1" and self.latent_inputs == "dac":
            raise ValueError("Stage 1 doesn't train DAC: `latent_inputs` must be 'bcm' or 'hidden'.")
        unsupported = {
            "packing": (False,),
            "padding_free": (False,),
            "loss_type": ("nll",),
            "label_smoothing_factor": (0.0,),
            "completion_only_loss": (None, False),
        }
        for name, allowed in unsupported.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"V-Reflection doesn't support `{name}={getattr(self, name)!r}`: leave it out.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator reads ids, messages and images.")
        # The collator renders and tokenizes, pictures included; trl's own preparation knows no reflections.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.latent_inputs == "hidden" and self.gradient_checkpointing:
            raise ValueError(
                "`latent_inputs='hidden'` decodes with a cache, which gradient checkpointing forbids: set "
                "`gradient_checkpointing=False`."
            )


@dataclass
class VReflectionScriptArguments:
    r"""
    What `vreflection-train` loads and saves.

    Args:
        model_name_or_path (`str`, *optional*):
            A V-Reflection or stock Qwen2.5-VL checkpoint. Left out: the untrained tiny model, with `from_scratch`.
        from_scratch (`bool`, *optional*, defaults to `False`):
            Whether to train the untrained tiny model.
        dataset_name (`str`):
            `"glyphsearch"`, `"glyphsearch_curriculum"`, or a `datasets` id or local folder with rows in the project's
            message format.
        dataset_options (`dict`, *optional*):
            Arguments of the GlyphSearch functions, or of `datasets.load_dataset`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the weights are loaded and trained.
        save_dtype (`str`, *optional*):
            Dtype of the final checkpoint, if another one.
        latent_feedback (`str`, *optional*):
            What `generate` feeds back by default, written into generation_config.json: `"hidden"` or `"dac"`.
        model_options (`dict`, *optional*):
            Fields of `VReflectionConfig` and arguments of `from_pretrained`.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to start from."})
    from_scratch: bool = field(default=False, metadata={"help": "Start from the untrained tiny model."})
    dataset_name: str | None = field(default=None, metadata={"help": "glyphsearch, or a datasets id or folder."})
    dataset_options: dict | str | None = field(default=None, metadata={"help": "Arguments of the data set."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights in training."})
    save_dtype: str | None = field(default=None, metadata={"help": "Dtype of the final checkpoint."})
    latent_feedback: str | None = field(default=None, metadata={"help": "Default feedback of generate."})
    model_options: dict | str | None = field(default=None, metadata={"help": "Fields of VReflectionConfig."})

    def __post_init__(self):
        if self.from_scratch == (self.model_name_or_path is not None):
            raise ValueError("Set either `model_name_or_path` or `from_scratch: true`.")
        if self.dataset_name is None:
            raise ValueError("Set `dataset_name`.")
