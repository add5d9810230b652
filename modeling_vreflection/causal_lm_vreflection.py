"""The whole model over any backbone: its forward pass with the vocabulary projection, making it, loading, saving."""

from dataclasses import fields
from inspect import signature

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple, logging

from .decoding_vreflection import ReflectionOptions
from .outputs_vreflection import VReflectionCausalLMOutputWithPast
from .processing_vreflection import LATENT_TOKENS


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a checkpoint lies; its tokenizer and processor lie there, too.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


# The model classes by the model type of their backbone.
MODEL_CLASSES: dict[str, type] = {}

OUTPUT_FIELDS = frozenset(field.name for field in fields(VReflectionCausalLMOutputWithPast))


class ReflectionCausalLMMixin:
    """A whole model with reflections; comes before the stock class.

    Attributes:
        model_class (`type`): The backbone with BCM and DAC.
        processor_class (`type`): The processor that goes with the model.
        hub_classes (`dict[str, str]`): The `auto_map` of a checkpoint. All of its model classes are the whole model: whoever
            loads `AutoModel` wants to call `generate`.
        stock_key_mapping (`dict[str, str]`): Weights' names in older stock checkpoints, as regular expressions, and in ours.
    """

    model_class: type
    processor_class: type
    stock_key_mapping: dict[str, str] = {}
    # The loss divides by `num_items_in_batch`: exact over accumulation steps.
    accepts_loss_kwargs = True
    # `has_bcm=False` and `has_dac=False` leave the modules of a checkpoint where they are.
    _keys_to_ignore_on_load_unexpected = [r"^model\.(bcm|dac)\."]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "hub_classes"):  # a subclass of a model class, as FSDP makes them
            return
        MODEL_CLASSES[cls.config_class.backbone_type] = cls
        model = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        cls.hub_classes = {
            "AutoConfig": f"configuration_vreflection.{cls.config_class.__name__}",
            "AutoProcessor": f"processing_vreflection.{cls.processor_class.__name__}",
            **dict.fromkeys(("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"), model),
        }

    def __init__(self, config):
        # Past the stock class's own constructor, which would build the stock backbone first.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        boxes: torch.LongTensor | None = None,
        latent_inputs: str | None = None,
        bcm_receives_ce: bool = True,
        latents: torch.Tensor | None = None,
        latent_state: torch.Tensor | None = None,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> VReflectionCausalLMOutputWithPast:
        """The stock forward pass, with reflection segments where `input_ids` hold them.

        Args:
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Where rows hold several samples each, every
                token's position in its own sample, with `mm_token_type_ids`, `attention_mask=None` and
                `use_cache=False`: attention stays within samples.
            boxes (`torch.LongTensor` of shape `(G, S, 5)`, *optional*): For each segment, in the order of `input_ids`, the
                box of each step: x0, y0, x1, y1 in 1/65,536 of its image's sides, and the image's index in
                `image_grid_thw`. The processor makes them. Or (G, 5), one box a segment, with the image's index in front.
            latent_inputs (`str`, *optional*): What fills the slots. `"bcm"`: Z_T, one pass. `"dac"`: Z_S; a first pass
                over Z_T gives the states that query DAC. `"hidden"`: the states themselves, step by step, as decoding
                does. Required where there are slots.
            bcm_receives_ce (`bool`, *optional*, defaults to `True`): Whether gradients flow into BCM through the slots.
            latents (`torch.Tensor` of shape `(B, M, D)`, *optional*): Latents to replay, such as those that `generate`
                returns: the n-th slot of a row holds its n-th latent, wherever the slot stands. Only a slot in the last
                column may lack one. The output then holds, by row and slot, `latent_states` and, where DAC looks,
                `student_latents` (B, M, D): what these states feed. With `latent_inputs`, `"hidden"` or `"dac"`, the slots
                hold the same values in a second pass, and gradients go through them into what made them.
            latent_state (`torch.Tensor` of shape `(B, 1, D)`, *optional*): What `generate` feeds to rows in a slot.
            skip_logits (`bool`, *optional*, defaults to `False`): Return zeros, which cost nothing, for logits that
                nobody will read: `generate` sets it where the next token of every row is forced.
            past_key_values (`Cache`, *optional*): `cache`, as transformers before 5.24 calls it.

        Raises:
            ValueError: Slots that nothing fills; segments of the wrong length; another number of boxes than segments;
                a box outside its image, or in one that isn't shown before the segment; a `latent_inputs` that the model or
                the batch doesn't allow; fewer latents than slots; both names of the cache; videos; embeddings or a cache
                beside segments.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            # The stock names of a video stay in the signature, so that it is refused and not ignored.
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            boxes=boxes,
            latent_inputs=latent_inputs,
            bcm_receives_ce=bcm_receives_ce,
            latents=latents,
            latent_state=latent_state,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        vocab_size = self.config.text_config.vocab_size
        if skip_logits:
            logits = hidden.new_zeros(()).expand(len(hidden), 1, vocab_size)
        else:
            logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        # The stock backbone also returns `rope_deltas` before transformers 5.20, what the vision encoder saw from 5.24 on.
        known = {name: value for name, value in outputs.items() if name in OUTPUT_FIELDS}
        return VReflectionCausalLMOutputWithPast(loss=loss, logits=logits, **known)

    # `generate` asks for the signature of a Hub model's `forward` at every step; found once it costs a fifth.
    forward.__signature__ = signature(forward)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a V-Reflection checkpoint, or a stock one of its backbone, of any age.

        From a stock checkpoint every backbone weight loads, BCM and DAC are initialised, and ids after the tokenizer's
        last are given to the three tokens, whose rows start at the mean embedding. [`from_backbone`] also makes the
        processor that goes with it.
        """
        kwargs.setdefault("key_mapping", cls.stock_key_mapping)
        quantization = kwargs.get("quantization_config")
        if getattr(quantization, "llm_int8_skip_modules", ()) is None:
            # bitsandbytes quantises what it reads, and a stock checkpoint has neither of the two modules.
            quantization.llm_int8_skip_modules = ["lm_head", "model.bcm", "model.dac"]
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers puts fields of the config that the checkpoint's generation config doesn't know there, too.
        for name in set(kwargs) & set(vars(model.generation_config)) - set(vars(GenerationConfig())):
            if hasattr(model.config, name):
                delattr(model.generation_config, name)
        if model.config.latent_token_id is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
            model.add_latent_tokens(len(tokenizer))
        elif model.generation_config._from_model_config:
            model._default_generation_config()
            if model.config.has_dac:
                logger.warning(
                    "No generation_config.json: `latent_feedback='hidden'` is taken; set 'dac' if trained so."
                )
        # Values that decoding would refuse are refused here.
        ReflectionOptions.resolve(model.config, model.generation_config)
        return loaded

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path, latent_tokens: tuple[str, str, str] = LATENT_TOKENS, **kwargs
    ) -> tuple:
        """Makes a V-Reflection model and its processor from a stock folder or Hub id; its model type says of which class.

        Looks know where they are (`patch_positions="sincos"`), unless `patch_positions="none"`, as the paper has it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The stock checkpoint.
            latent_tokens (`tuple[str, str, str]`, *optional*): Names of the start, slot and end token.
            kwargs: Arguments of [`~PreTrainedModel.from_pretrained`], and fields of the model's config.

        Returns:
            `tuple`: The model and its processor.

        Raises:
            ValueError: A checkpoint of a backbone that no class is for.
        """
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        stock_config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        model_class = MODEL_CLASSES.get(stock_config.get("model_type"))
        if model_class is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has the model type {stock_config.get('model_type')!r}; a backbone is one of "
                f"{', '.join(MODEL_CLASSES)}."
            )
        kwargs.setdefault("patch_positions", "sincos")
        model = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor = model.processor_class.from_backbone(
            pretrained_model_name_or_path, latent_tokens, model.config.num_latent_tokens, **hub
        )
        ids = tuple(processor.tokenizer.convert_tokens_to_ids(latent_tokens))
        if ids != model.config.latent_token_ids:
            raise ValueError(
                f"The tokenizer gave the latent tokens the ids {ids}, the model {model.config.latent_token_ids}."
            )
        model.config.think_end_token_id = processor.think_end_token_id
        return model, processor

    def add_latent_tokens(self, first_id: int):
        """Gives three ids from `first_id` on to the start, slot and end token.

        Rows of a padded vocabulary are reused; where there are too few, the embeddings grow. The new rows start at the
        mean of the rows before them.

        Args:
            first_id (`int`): The number of tokens in the tokenizer.
        """
        ids = range(first_id, first_id + 3)
        if ids[-1] >= self.get_input_embeddings().num_embeddings:
            self.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        with torch.no_grad():
            for module in {self.get_input_embeddings(), self.get_output_embeddings()}:
                module.weight[ids[0] : ids[-1] + 1] = module.weight[:first_id].float().mean(0).to(module.weight.dtype)
        self.config.latent_start_token_id, self.config.latent_token_id, self.config.latent_end_token_id = ids
        self._default_generation_config()

    def _default_generation_config(self):
        """Writes how a reflection is decoded by default into the generation config."""
        given = self.generation_config.to_diff_dict()
        if given.pop("_from_model_config", False):
            given["use_cache"] = True  # the config.json's is of training, which turns it off
        given |= {"latent_steps": self.config.num_latent_tokens, "latent_feedback": "hidden"}
        # Only an explicit generation config keeps entries that transformers doesn't know.
        self.generation_config = GenerationConfig(**given, _from_model_config=False)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the checkpoint with the code that loads it. The keys stay as they are in the model, so that resuming finds them.

        Raises:
            ValueError: A generation config with values that aren't allowed, or of a checkpoint that would decode by DAC
                (`latent_feedback`) and has none.
        """
        self.config.check_reflection()
        ReflectionOptions.resolve(self.config, self.generation_config)
        if getattr(self.generation_config, "latent_feedback", None) == "dac" and not self.config.has_dac:
            raise ValueError(
                "The generation config's `latent_feedback` is 'dac', which needs DAC, and `has_dac=False` leaves it out: keep "
                "DAC, or set `generation_config.latent_feedback = 'hidden'`."
            )
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(self.hub_classes)
        return super().save_pretrained(save_directory, *args, **kwargs)
