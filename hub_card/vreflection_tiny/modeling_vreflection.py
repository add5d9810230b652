"""V-Reflection: a Qwen2.5-VL that feeds its own hidden state back, S times, between `<|sovt|>` and `<|eovt|>`.

Symbols in shapes: B rows, T tokens, G reflection segments of the batch, S latent steps, D hidden size, L merged patches
(the largest count among the segments' images; the others are padded with zeros).
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.utils import can_return_tuple

from .compression_vreflection import (
    BOX_UNIT,
    QUERY_STD,
    BoxGuidedCompression,
    DynamicAutoregressiveCompression,
    pad_features,
    pool_region,
    project_attention,
)
from .configuration_vreflection import AUTO_MAP, VReflectionConfig
from .generation_vreflection import CACHE, ReflectionGenerationMixin
from .processing_vreflection import LATENT_TOKENS, VReflectionProcessor


# transformers renames the keys of older Qwen2.5-VL checkpoints for its own class only, and would take our modules for
# layers of the language model.
KEY_MAPPING = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual|bcm|dac))": "model.language_model",
}
LATENT_INPUTS = ("bcm", "dac", "hidden")
# Arguments of `from_pretrained` that say where a checkpoint lies; its tokenizer and processor lie there, too.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


@dataclass
class LatentOutput:
    """What was seen at the reflection segments, in the order of the segments in the batch.

    Args:
        latent_states (`torch.Tensor` of shape `(G, S, D)`): H, the states that predict the slots.
        teacher_latents (`torch.Tensor` of shape `(G, S, D)`): Z_T (Eq. 1). `None` without boxes or BCM.
        student_latents (`torch.Tensor` of shape `(G, S, D)`): Z_S (Eq. 3). `None` without images or DAC.
        teacher_attention (`torch.FloatTensor` of shape `(G, S, L)`): Â_T, on the grid of the box's image (Eq. 4);
            uniform over the box where there is no BCM. `None` without boxes.
        student_attention (`torch.FloatTensor` of shape `(G, S, L)`): A_S, over the box's image, or without boxes over
            all images of the row before the segment.
    """

    latent_states: torch.Tensor | None = None
    teacher_latents: torch.Tensor | None = None
    student_latents: torch.Tensor | None = None
    teacher_attention: torch.FloatTensor | None = None
    student_attention: torch.FloatTensor | None = None


@dataclass
class VReflectionModelOutputWithPast(LatentOutput, BaseModelOutputWithPast):
    """The backbone's usual fields, and those of [`LatentOutput`]."""


@dataclass
class VReflectionCausalLMOutputWithPast(LatentOutput, CausalLMOutputWithPast):
    """The usual fields, those of [`LatentOutput`], and `last_hidden_state` (B, T, D)."""

    last_hidden_state: torch.Tensor | None = None


OUTPUT_FIELDS = frozenset(field.name for field in fields(VReflectionCausalLMOutputWithPast))


class VReflectionModel(Qwen2_5_VLModel):
    """The Qwen2.5-VL backbone with BCM and DAC, which only training runs."""

    config_class = VReflectionConfig
    config: VReflectionConfig

    def __init__(self, config: VReflectionConfig):
        super().__init__(config)
        size = (config.text_config.hidden_size, config.compression_num_heads, config.num_latent_tokens)
        self.bcm = BoxGuidedCompression(*size) if config.has_bcm else None
        self.dac = DynamicAutoregressiveCompression(*size, config.dac_queries) if config.has_dac else None
        self.post_init()

    def _init_weights(self, module: nn.Module):
        initialise(super()._init_weights, module)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        boxes: torch.LongTensor | None = None,
        latent_inputs: str | None = None,
        bcm_receives_ce: bool = True,
        latent_state: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See [`VReflectionForConditionalGeneration.forward`]; `latent_state` (B, 1, D) is what `generate` feeds back.

        Returns:
            `BaseModelOutputWithPast`: where slots are filled, a [`VReflectionModelOutputWithPast`].
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one thing: pass one of them.")
            cache = past_key_values
        if position_ids is not None and position_ids.ndim == 2 and input_ids is not None and attention_mask is None:
            types = kwargs.get("mm_token_type_ids")
            if types is not None:
                position_ids = self._packed_positions(input_ids, position_ids, types, image_grid_thw)
                if use_cache is not False:
                    raise ValueError("Packed rows need `use_cache=False`: with a cache samples would see one another.")
            elif (position_ids.diff() < 0).any():
                raise ValueError("Packed rows, which `position_ids` that begin anew mean, need `mm_token_type_ids`.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "image_grid_thw": image_grid_thw,
            **kwargs,
        }
        if latent_state is not None:
            embeds = self.get_input_embeddings()(input_ids)
            in_slot = (input_ids == self.config.latent_token_id)[..., None]
            inputs_embeds = torch.where(in_slot, latent_state.to(embeds.dtype), embeds)
        elif latent_inputs is not None:
            if latent_inputs not in LATENT_INPUTS:
                raise ValueError(f"`latent_inputs` must be one of {', '.join(LATENT_INPUTS)}, got {latent_inputs!r}.")
            if input_ids is None or inputs_embeds is not None:
                raise ValueError(
                    "`latent_inputs` fills the slots among `input_ids`: pass these, and no `inputs_embeds`."
                )
            segments = find_segments(input_ids, self.config)
            if len(segments[0]):
                if cache is not None:
                    raise ValueError("Slots are filled in whole sequences: pass no cache with `latent_inputs`.")
                if kwargs.get("pixel_values_videos") is not None:
                    raise ValueError(
                        "A reflection looks at pictures: pass no `pixel_values_videos` with `latent_inputs`."
                    )
                features = self._image_features(pixel_values, image_grid_thw, mm_encoder_outputs)
                return self._reflect(inputs, segments, features, boxes, latent_inputs, bcm_receives_ce)
            if boxes is not None and len(boxes):
                raise ValueError(f"{len(boxes)} boxes, but no reflection segment in `input_ids`.")
        elif boxes is not None and len(boxes):
            raise ValueError(
                f"{len(boxes)} boxes, and nothing that uses them: pass `latent_inputs`, one of {', '.join(LATENT_INPUTS)}."
            )
        elif input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            if self.config.latent_token_id is not None and (input_ids == self.config.latent_token_id).any():
                raise ValueError(
                    "`input_ids` hold latent slots and nothing fills them: pass `latent_inputs`, one of "
                    f"{', '.join(LATENT_INPUTS)}. Prompts must not hold any; the chat template drops past reflections."
                )
        if mm_encoder_outputs is not None:  # transformers before 5.20 doesn't know it
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return super().forward(
            **inputs,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
        )

    # `generate` reads the parameters' names.
    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs):
        """The stock features, without a graph where the vision encoder is frozen.

        Gradient checkpointing lets its input require gradients, and would run it once more, forward and backward, for nothing.
        """
        learns = any(parameter.requires_grad for parameter in self.visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return super().get_image_features(pixel_values, image_grid_thw, **kwargs)

    def _packed_positions(self, input_ids, position_ids, mm_token_type_ids, image_grid_thw) -> torch.LongTensor:
        """Positions (4, B, T) of packed rows: of the text, which keep samples apart, then in three dimensions."""
        positions, _ = self.get_rope_index(input_ids, mm_token_type_ids, image_grid_thw)  # as if a row were one sample
        starts = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids
        positions = positions - positions.gather(2, starts.expand_as(positions))
        return torch.cat([position_ids[None], positions])

    def _image_features(self, pixel_values, image_grid_thw, mm_encoder_outputs) -> list[torch.Tensor]:
        """F_global of every image of the batch: a list of (L_i, D)."""
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            return list(mm_encoder_outputs["image"].pooler_output)
        if pixel_values is None:
            return []
        return list(self.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output)

    def _reflect(self, inputs, segments, features, boxes, latent_inputs, bcm_receives_ce):
        """One training pass over a batch with segments: fills the slots, runs the language model, sees with DAC."""
        rows, first = segments
        steps = torch.arange(self.config.num_latent_tokens, device=first.device)
        slots = (rows[:, None], first[:, None] + steps)

        embeds = self.get_input_embeddings()(inputs["input_ids"])
        if features:
            images = torch.cat(features).to(embeds.dtype)
            mask, _ = self.get_placeholder_mask(inputs["input_ids"], inputs_embeds=embeds, image_features=images)
            embeds = embeds.masked_scatter(mask, images)

        teacher_latents, teacher_attention = None, None
        if boxes is not None:
            regions = self._regions(boxes, segments, features, inputs["image_grid_thw"])
            teacher_latents, teacher_attention = self._teach(regions)
        if teacher_latents is None and latent_inputs == "bcm":
            raise ValueError(f"`latent_inputs='bcm'` needs {'boxes' if self.bcm is not None else 'a model with BCM'}.")
        if latent_inputs == "dac" and (self.dac is None or boxes is None):
            raise ValueError(f"`latent_inputs='dac'` needs {'boxes' if self.dac is not None else 'a model with DAC'}.")

        if latent_inputs == "hidden" or teacher_latents is None:
            outputs = self._roll_out(inputs, embeds, rows, first)
        else:
            receives = latent_inputs == "bcm" and bcm_receives_ce
            filled = teacher_latents if receives else teacher_latents.detach()
            outputs = self._run(inputs, embeds.index_put(slots, filled.to(embeds.dtype)))
        states = outputs.last_hidden_state[slots[0], slots[1] - 1]

        student_latents, student_attention = None, None
        if self.dac is not None:
            if boxes is None:
                global_features = images_before(inputs, segments, features, self.config.image_token_id)
            else:
                global_features = [feature for feature, *_ in regions]
            if all(len(feature) for feature in global_features):
                at_slots = self.config.query_position == "at"
                queries = outputs.last_hidden_state[slots] if at_slots else states
                student_latents, student_attention = self.dac(queries, *pad_features(global_features))
        if latent_inputs == "dac":
            outputs = self._run(inputs, embeds.index_put(slots, student_latents.to(embeds.dtype)))
        return VReflectionModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            latent_states=states,
            teacher_latents=teacher_latents,
            student_latents=student_latents,
            teacher_attention=teacher_attention,
            student_attention=student_attention,
        )

    def _regions(self, boxes, segments, features, image_grid_thw) -> list[tuple]:
        """For every segment, its image's features (L, D), its box and its image's merged grid (h, w)."""
        if len(boxes) != len(segments[0]):
            raise ValueError(f"{len(boxes)} boxes for {len(segments[0])} reflection segments; there must be one each.")
        merge = self.config.vision_config.spatial_merge_size
        grids = [(height // merge, width // merge) for _, height, width in image_grid_thw.tolist()] if features else []
        regions = []
        for number, (image, *box) in enumerate(boxes.tolist()):
            x0, y0, x1, y1 = box
            if not 0 <= image < len(grids):
                raise ValueError(f"Box {number} lies in image {image}, but the batch has {len(grids)} images.")
            if not (0 <= x0 <= x1 <= BOX_UNIT and 0 <= y0 <= y1 <= BOX_UNIT):
                raise ValueError(f"Box {number} must be x0 <= x1, y0 <= y1 within 0 to {BOX_UNIT}, got {box}.")
            regions.append((features[image], box, grids[image]))
        return regions

    def _teach(self, regions: list[tuple]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Z_T (G, S, D), `None` without BCM, and Â_T (G, S, L)."""
        pooling = self.config.region_pooling
        local, mask = pad_features([pool_region(*region, pooling) for region in regions])
        if self.bcm is None:
            latents = None
            uniform = mask / mask.sum(1, keepdim=True)
            attention = uniform[:, None].expand(-1, self.config.num_latent_tokens, -1)
        else:
            latents, attention = self.bcm(local, mask)
        projected = [
            project_attention(rows[:, inside], box, grid, pooling).T
            for rows, inside, (_, box, grid) in zip(attention, mask, regions)
        ]
        return latents, pad_features(projected)[0].transpose(1, 2)

    def _run(self, inputs: dict, embeds: torch.Tensor) -> BaseModelOutputWithPast:
        return super().forward(**inputs, inputs_embeds=embeds, use_cache=False)

    def _roll_out(self, inputs: dict, embeds: torch.Tensor, rows: torch.Tensor, first: torch.Tensor):
        """Does what decoding does: the prompt into a cache, S single steps that feed each state back, then the rest."""
        if self.training and self.language_model.layers[0].gradient_checkpointing:
            raise ValueError(
                "Feeding the states back needs a cache, which gradient checkpointing forbids: set "
                "`gradient_checkpointing=False`, or another `latent_inputs`."
            )
        position_ids = inputs["position_ids"]
        if is_packed(position_ids):
            raise ValueError("Feeding the states back can't run on packed rows: turn `sample_packing` off.")
        if len(rows.unique()) < len(rows) or len(first.unique()) > 1:
            raise ValueError(
                "Feeding the states back needs one segment a row, all starting in one column (pad the prompts on the "
                f"left); the segments of rows {rows.tolist()} start at {first.tolist()}."
            )
        kwargs = {
            key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "position_ids")
        }
        grids = {key: kwargs.pop(key, None) for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        attention_mask = inputs["attention_mask"]
        if position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids=inputs["input_ids"],
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                **{CACHE: None},
                mm_token_type_ids=kwargs.pop("mm_token_type_ids", None),
                **grids,
            )
        reflects = torch.zeros(len(embeds), 1, 1, dtype=torch.bool, device=embeds.device)
        reflects[rows] = True
        cache = DynamicCache(config=self.config.get_text_config())
        start, length = int(first[0]), embeds.shape[1]
        ends = [start, *range(start + 1, start + 1 + self.config.num_latent_tokens), length]
        states, begin = [], 0
        for end in ends:
            chunk = embeds[:, begin:end]
            if start <= begin < start + self.config.num_latent_tokens:
                chunk = torch.where(reflects, states[-1][:, -1:], chunk)
            if begin < end:
                outputs = self.language_model(
                    inputs_embeds=chunk,
                    attention_mask=None if attention_mask is None else attention_mask[:, :end],
                    position_ids=None if position_ids is None else position_ids[..., begin:end],
                    **{CACHE: cache},
                    use_cache=True,
                    **kwargs,
                )
                states.append(outputs.last_hidden_state)
            begin = end
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, 1))


class VReflectionForConditionalGeneration(ReflectionGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that looks again while it thinks.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> content = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "Which glyph is on the red cross?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> sequences = model.generate(**inputs, max_new_tokens=32)
    >>> processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ['K']
    ```
    """

    config_class = VReflectionConfig
    config: VReflectionConfig
    # The loss divides by `num_items_in_batch`: exact over accumulation steps.
    accepts_loss_kwargs = True
    # `has_bcm=False` and `has_dac=False` leave the modules of a checkpoint where they are.
    _keys_to_ignore_on_load_unexpected = [r"^model\.(bcm|dac)\."]

    def __init__(self, config: VReflectionConfig):
        # Past the parent's own constructor, which would build the stock backbone first.
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = VReflectionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        initialise(super()._init_weights, module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a V-Reflection checkpoint, or a stock Qwen2.5-VL one of any age.

        From a stock checkpoint every backbone weight loads, BCM and DAC are initialised, and ids after the tokenizer's
        last are given to the three tokens, whose rows start at the mean embedding. [`from_backbone`] also makes the
        processor that goes with it.
        """
        kwargs.setdefault("key_mapping", KEY_MAPPING)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.latent_token_id is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
            model.add_latent_tokens(len(tokenizer))
        return loaded

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path, latent_tokens: tuple[str, str, str] = LATENT_TOKENS, **kwargs
    ) -> tuple["VReflectionForConditionalGeneration", VReflectionProcessor]:
        """Makes a V-Reflection model and its processor from a stock Qwen2.5-VL folder or Hub id.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The stock checkpoint.
            latent_tokens (`tuple[str, str, str]`, *optional*): Names of the start, slot and end token.
            kwargs: Arguments of [`~PreTrainedModel.from_pretrained`], and fields of [`VReflectionConfig`].

        Returns:
            `tuple`: The model and its [`VReflectionProcessor`].
        """
        model = cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        processor = VReflectionProcessor.from_backbone(
            pretrained_model_name_or_path, latent_tokens, model.config.num_latent_tokens, **hub
        )
        ids = tuple(processor.tokenizer.convert_tokens_to_ids(latent_tokens))
        if ids != model.config.latent_token_ids:
            raise ValueError(
                f"The tokenizer gave the latent tokens the ids {ids}, the model {model.config.latent_token_ids}."
            )
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
        # Only an explicit generation config keeps entries that transformers doesn't know.
        self.generation_config = GenerationConfig(
            **{**self.generation_config.to_diff_dict(), "_from_model_config": False},
            latent_steps=self.config.num_latent_tokens,
            latent_feedback="hidden",
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the checkpoint with the code that loads it. The keys stay as they are in the model, so that resuming finds them."""
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

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
        latent_state: torch.Tensor | None = None,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> VReflectionCausalLMOutputWithPast:
        """Qwen2.5-VL's forward pass, with reflection segments where `input_ids` hold them.

        Args:
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Where rows hold several samples each, every
                token's position in its own sample, with `mm_token_type_ids`, `attention_mask=None` and
                `use_cache=False`: attention stays within samples.
            boxes (`torch.LongTensor` of shape `(G, 5)`, *optional*): One row a segment, in the order of `input_ids`:
                the image's index in `image_grid_thw`, then x0, y0, x1, y1 in 1/65,536 of its sides. The processor makes
                them.
            latent_inputs (`str`, *optional*): What fills the slots. `"bcm"`: Z_T, one pass. `"dac"`: Z_S; a first pass
                over Z_T gives the states that query DAC. `"hidden"`: the states themselves, step by step, as decoding
                does. Required where there are slots.
            bcm_receives_ce (`bool`, *optional*, defaults to `True`): Whether gradients flow into BCM through the slots.
            latent_state (`torch.Tensor` of shape `(B, 1, D)`, *optional*): What `generate` feeds to rows in a slot.
            skip_logits (`bool`, *optional*, defaults to `False`): Return zeros, which cost nothing, for logits that
                nobody will read: `generate` sets it where the next token of every row is forced.
            past_key_values (`Cache`, *optional*): `cache`, as transformers before 5.24 calls it.

        Raises:
            ValueError: Slots that nothing fills; segments of the wrong length; another number of boxes than segments;
                a box outside its image; a `latent_inputs` that the model or the batch doesn't allow; both names of the
                cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            boxes=boxes,
            latent_inputs=latent_inputs,
            bcm_receives_ce=bcm_receives_ce,
            latent_state=latent_state,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if skip_logits:
            logits = hidden.new_zeros(()).expand(len(hidden), 1, self.config.text_config.vocab_size)
        else:
            logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        # The stock backbone also returns `rope_deltas` before transformers 5.20, what the vision encoder saw from 5.24 on.
        known = {name: value for name, value in outputs.items() if name in OUTPUT_FIELDS}
        return VReflectionCausalLMOutputWithPast(loss=loss, logits=logits, **known)


def initialise(initialise_stock, module: nn.Module):
    """The stock initialisation, and N(0, 0.02²) for learned queries."""
    initialise_stock(module)
    queries = getattr(module, "queries", None)
    if isinstance(queries, nn.Parameter) and not getattr(queries, "_is_hf_initialized", False):
        nn.init.normal_(queries, std=QUERY_STD)


def find_segments(input_ids: torch.LongTensor, config: VReflectionConfig) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Finds the reflection segments in ids (B, T): their rows (G,) and the columns of their first slots (G,)."""
    in_slot = input_ids == config.latent_token_id
    begins = in_slot.clone()
    begins[:, 1:] &= ~in_slot[:, :-1]
    rows, first = begins.nonzero(as_tuple=True)
    lengths = in_slot.flatten().cumsum(0).view_as(in_slot)
    ends = in_slot.clone()
    ends[:, :-1] &= ~in_slot[:, 1:]
    lengths = lengths[ends] - lengths[begins] + 1
    opened = input_ids[rows, first - 1] == config.latent_start_token_id
    wrong = ((lengths != config.num_latent_tokens) | ~opened | (first == 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"A segment is a start token and {config.num_latent_tokens} slots; segments {wrong} in rows "
            f"{rows[wrong].tolist()} have {lengths[wrong].tolist()} slots, or no start token before them."
        )
    return rows, first


def is_packed(position_ids: torch.LongTensor | None) -> bool:
    """Whether positions are (4, B, T): transformers' form of rows that hold several samples."""
    return position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4


def images_before(
    inputs: dict, segments: tuple, features: list[torch.Tensor], image_token_id: int
) -> list[torch.Tensor]:
    """F_global where there is no box: the features of all images of the segment's sample before it, (L, D) each."""
    rows, first = segments
    is_image = inputs["input_ids"] == image_token_id
    seen = is_image.flatten().cumsum(0).view_as(is_image) - is_image.long()  # image tokens before each token
    positions = inputs["position_ids"]
    starts = first - positions[0, rows, first] if is_packed(positions) else torch.zeros_like(first)
    table = torch.cat(features) if features else torch.empty(0, 0)
    return [
        table[seen[row, start] : seen[row, column]]
        for row, start, column in zip(rows.tolist(), starts.tolist(), first.tolist())
    ]


# Which class the checkpoint's code is copied for is of no matter: `save_pretrained` writes the whole map.
VReflectionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
