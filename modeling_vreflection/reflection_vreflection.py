"""Algorithm 1 on any backbone: where reflections lie in a batch, what fills their slots, what is seen at them.

Symbols in shapes: B rows, T tokens, G reflection segments of the batch, S latent steps, D hidden size, L merged patches of
all images of a segment's sample before it (the largest count among the segments; the others are padded with zeros).
"""

from itertools import groupby

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .compression_vreflection import (
    BoxGuidedCompression,
    DynamicAutoregressiveCompression,
    initialise_queries,
    pad_features,
)
from .generation_vreflection import CACHE
from .outputs_vreflection import VReflectionModelOutputWithPast
from .processing_vreflection import OTHER_MEDIA, refuse_other_media
from .regions_vreflection import (
    add_positions,
    box_patches,
    boxes_by_step,
    check_boxes,
    merged_grids,
    pool_region,
    project_attention,
)
from .replay_vreflection import ReplayMixin
from .segments_vreflection import deepstack_of_columns, features_of, find_segments, images_before, is_packed


LATENT_INPUTS = ("bcm", "dac", "hidden")


class ReflectionModelMixin(ReplayMixin):
    """A backbone with BCM and DAC; comes before the stock backbone class, which embeds, encodes pictures and runs the layers."""

    def __init__(self, config):
        super().__init__(config)
        config.check_reflection()  # `from_pretrained` sets fields after the config was checked
        size = (config.text_config.hidden_size, config.compression_num_heads, config.num_latent_tokens)
        self.bcm = BoxGuidedCompression(*size) if config.has_bcm else None
        self.dac = DynamicAutoregressiveCompression(*size, config.dac_queries) if config.has_dac else None
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        initialise_queries(module)

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
        mm_token_type_ids: torch.IntTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        boxes: torch.LongTensor | None = None,
        latent_inputs: str | None = None,
        bcm_receives_ce: bool = True,
        latents: torch.Tensor | None = None,
        latent_state: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See [`ReflectionCausalLMMixin.forward`]; `latent_state` (B, 1, D) is what `generate` feeds back.

        Returns:
            `BaseModelOutputWithPast`: where slots are filled, a [`VReflectionModelOutputWithPast`].
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one thing: pass one of them.")
            cache = past_key_values
        refuse_other_media(**kwargs, videos=(mm_encoder_outputs or {}).get("video"))
        kwargs = {name: value for name, value in kwargs.items() if name not in OTHER_MEDIA}
        prompt = input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling()
        if prompt and (input_ids == self.config.video_token_id).any():
            raise ValueError("`input_ids` hold a video's tokens: V-Reflection looks at pictures, not videos.")
        position_ids = self._with_packed_positions(
            input_ids, position_ids, attention_mask, mm_token_type_ids, image_grid_thw, use_cache
        )
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "image_grid_thw": image_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        if latent_state is not None:
            embeds = self.get_input_embeddings()(input_ids)
            in_slot = (input_ids == self.config.latent_token_id)[..., None]
            inputs["input_ids"], inputs_embeds = None, torch.where(in_slot, latent_state.to(embeds.dtype), embeds)
        elif latents is not None:
            if latent_inputs not in (None, "dac", "hidden") or boxes is not None:
                raise ValueError("`latents` fill the slots: pass neither `boxes` nor `latent_inputs='bcm'` with them.")
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("`latents` fill the slots among `input_ids`: pass these, and no `inputs_embeds`.")
            encoded = self._encode_images(pixel_values, image_grid_thw, mm_encoder_outputs)
            embeds, deepstack = self._embed(input_ids, encoded)
            inputs["position_ids"] = self._positions(inputs, embeds, cache)
            kwargs = {**kwargs, **deepstack}
            return self._replay(inputs, embeds, encoded, latents, latent_inputs, kwargs, cache, use_cache)
        elif latent_inputs is not None:
            segments = self._check_reflecting(input_ids, inputs_embeds, cache, boxes, latent_inputs)
            if segments is not None:
                encoded = self._encode_images(pixel_values, image_grid_thw, mm_encoder_outputs)
                return self._reflect(inputs, segments, encoded, boxes, latent_inputs, bcm_receives_ce, kwargs)
        else:
            self._check_unfilled(input_ids, boxes)
        if mm_encoder_outputs is not None:  # transformers before 5.20 doesn't know it
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        inputs |= {CACHE: cache, "inputs_embeds": inputs_embeds, "use_cache": use_cache, "pixel_values": pixel_values}
        return super().forward(**inputs, **kwargs)

    # `generate` reads the parameters' names.
    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs):
        """The stock features, without a graph where nothing before them learns: no weight of the vision encoder, no pixel.

        Gradient checkpointing lets its input require gradients, and would run it once more, forward and backward, for nothing.
        """
        learns = any(tensor.requires_grad for tensor in (pixel_values, *self.visual.parameters()))
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return super().get_image_features(pixel_values, image_grid_thw, **kwargs)

    def image_features(self, pixel_values, image_grid_thw, mm_encoder_outputs=None) -> list[torch.Tensor]:
        """F_global of every image of the batch: a list of (L_i, D)."""
        return features_of(self._encode_images(pixel_values, image_grid_thw, mm_encoder_outputs))

    def _encode_images(self, pixel_values, image_grid_thw, mm_encoder_outputs=None) -> ModelOutput | None:
        """The vision encoder's output for the batch's images, whose `pooler_output` is F_global; `None` without images."""
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            return mm_encoder_outputs["image"]
        if pixel_values is None:
            return None
        return self.get_image_features(pixel_values, image_grid_thw, return_dict=True)

    def grids(self, image_grid_thw: torch.LongTensor | None) -> list[tuple[int, int]]:
        """Height and width of each image's merged grid."""
        return merged_grids(image_grid_thw, self.config.vision_config.spatial_merge_size)

    def _with_packed_positions(
        self, input_ids, position_ids, attention_mask, mm_token_type_ids, image_grid_thw, use_cache
    ) -> torch.LongTensor | None:
        """Positions (4, B, T) of packed rows, given as (B, T): of the text, which keep samples apart, then in three dimensions."""
        if position_ids is None or position_ids.ndim != 2 or input_ids is None:
            return position_ids
        if attention_mask is not None:
            whole = getattr(attention_mask, "shape", None) == position_ids.shape
            if whole and ((position_ids.diff() < 0) & (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()).any():
                raise ValueError(
                    "Packed rows (`position_ids` that begin anew) need `attention_mask=None`, or samples see one another."
                )
            return position_ids
        if mm_token_type_ids is None:
            if (position_ids.diff() < 0).any():
                raise ValueError("Packed rows, which `position_ids` that begin anew mean, need `mm_token_type_ids`.")
            return position_ids
        if use_cache is not False:
            raise ValueError("Packed rows need `use_cache=False`: with a cache samples would see one another.")
        # As if a row were one sample, then less the position at which each sample starts.
        positions, _ = self.get_rope_index(
            input_ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw
        )
        starts = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids
        positions = positions - positions.gather(2, starts.expand_as(positions))
        return torch.cat([position_ids[None], positions])

    def _check_reflecting(self, input_ids, inputs_embeds, cache, boxes, latent_inputs) -> tuple | None:
        """Checks a call with `latent_inputs`; returns its segments, see [`find_segments`], or `None` if there are none."""
        if latent_inputs not in LATENT_INPUTS:
            raise ValueError(f"`latent_inputs` must be one of {', '.join(LATENT_INPUTS)}, got {latent_inputs!r}.")
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("`latent_inputs` fills the slots among `input_ids`: pass these, and no `inputs_embeds`.")
        segments = find_segments(input_ids, self.config)
        if not len(segments[0]):
            if boxes is not None and len(boxes):
                raise ValueError(f"{len(boxes)} boxes, but no reflection segment in `input_ids`.")
            return None
        if cache is not None:
            raise ValueError("Slots are filled in whole sequences: pass no cache with `latent_inputs`.")
        return segments

    def _check_unfilled(self, input_ids, boxes) -> None:
        """Checks a call without `latent_inputs`: it may hold neither boxes nor slots."""
        if boxes is not None and len(boxes):
            raise ValueError(
                f"{len(boxes)} boxes, and nothing that uses them: pass `latent_inputs`, one of {', '.join(LATENT_INPUTS)}."
            )
        if input_ids is None or input_ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        if self.config.latent_token_id is not None and (input_ids == self.config.latent_token_id).any():
            raise ValueError(
                "`input_ids` hold latent slots and nothing fills them: pass `latent_inputs`, one of "
                f"{', '.join(LATENT_INPUTS)}, or recorded `latents`. Prompts must not hold any; the chat template drops "
                "past reflections."
            )

    def _reflect(
        self,
        inputs: dict,
        segments: tuple[torch.LongTensor, torch.LongTensor],
        encoded: ModelOutput | None,
        boxes: torch.LongTensor | None,
        latent_inputs: str,
        bcm_receives_ce: bool,
        kwargs: dict,
    ) -> VReflectionModelOutputWithPast:
        """Algorithm 1 but for its losses: fills the slots, runs the language model, lets DAC look.

        Lines 1-2, 15-16 and 20 are `_teach`, line 3 is the pass over Z_T, lines 17-18 are DAC, line 19 the pass over Z_S.
        The losses, lines 4-12 and 19-23, are the trainer's.

        Args:
            inputs (`dict`): `input_ids`, `attention_mask`, `position_ids`, `image_grid_thw`, `mm_token_type_ids`.
            segments (`tuple`): See [`find_segments`].
            encoded (`ModelOutput`): The images, see `_encode_images`.
            boxes, latent_inputs, bcm_receives_ce: See [`ReflectionCausalLMMixin.forward`].
            kwargs (`dict`): What else the language model is given.
        """
        rows, first = segments
        steps = torch.arange(self.config.num_latent_tokens, device=first.device)
        slots = (rows[:, None], first[:, None] + steps)
        embeds, deepstack = self._embed(inputs["input_ids"], encoded)
        kwargs = {**kwargs, **deepstack}
        inputs = {**inputs, "position_ids": self._positions(inputs, embeds)}

        packed = inputs["position_ids"][0] if is_packed(inputs["position_ids"]) else None
        features = features_of(encoded)
        image_tokens = [len(feature) for feature in features]
        images = images_before(inputs["input_ids"], packed, segments, image_tokens, self.config.image_token_id)
        grids = self.grids(inputs["image_grid_thw"])
        features = self.looked_at(features, grids)

        teacher_latents, teacher_attention, inside_box = None, None, None
        if boxes is not None:
            teacher_latents, teacher_attention, inside_box = self._teach(boxes, images, features, grids)
        if teacher_latents is None and latent_inputs == "bcm":
            raise ValueError(f"`latent_inputs='bcm'` needs {'boxes' if self.bcm is not None else 'a model with BCM'}.")
        if latent_inputs == "dac" and (self.dac is None or boxes is None):
            raise ValueError(f"`latent_inputs='dac'` needs {'boxes' if self.dac is not None else 'a model with DAC'}.")

        if latent_inputs == "hidden" or teacher_latents is None:
            outputs = self._roll_out(inputs, embeds, rows, first, kwargs)
        else:
            receives = latent_inputs == "bcm" and bcm_receives_ce
            filled = teacher_latents if receives else teacher_latents.detach()
            outputs = self._run(inputs, embeds.index_put(slots, filled.to(embeds.dtype)), kwargs)
        states = outputs.last_hidden_state[slots[0], slots[1] - 1]

        student_latents, student_attention = None, None
        if self.dac is not None:
            global_features = [torch.cat([features[image] for image in before]) for before in images if before]
            if len(global_features) == len(images):
                at_slots = self.config.query_position == "at"
                queries = outputs.last_hidden_state[slots] if at_slots else states
                student_latents, student_attention = self.dac(queries, *pad_features(global_features))
        if latent_inputs == "dac":
            outputs = self._run(inputs, embeds.index_put(slots, student_latents.to(embeds.dtype)), kwargs)
        return VReflectionModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            latent_states=states,
            teacher_latents=teacher_latents,
            student_latents=student_latents,
            teacher_attention=teacher_attention,
            student_attention=student_attention,
            inside_box=inside_box,
        )

    def looked_at(self, features: list[torch.Tensor], grids: list[tuple[int, int]]) -> list[torch.Tensor]:
        """What BCM and DAC read of images with these merged grids: features (L_i, D), with `patch_positions` (L_i, 3D)."""
        if self.config.patch_positions == "none":
            return features
        return [add_positions(*image) for image in zip(features, grids)]

    def _embed(self, input_ids: torch.LongTensor, encoded: ModelOutput | None) -> tuple[torch.Tensor, dict]:
        """Embeddings (B, T, D) of the tokens with the images in their places, and what the layers add there (DeepStack)."""
        embeds = self.get_input_embeddings()(input_ids)
        if encoded is None:
            return embeds, {}
        features = torch.cat(list(encoded.pooler_output)).to(embeds.device, embeds.dtype)
        mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
        deepstack = {}
        if (levels := getattr(encoded, "deepstack_features", None)) is not None:
            # Older versions of transformers do not split a level into images.
            levels = [level if isinstance(level, torch.Tensor) else torch.cat(list(level)) for level in levels]
            deepstack = {"visual_pos_masks": mask[..., 0], "deepstack_visual_embeds": levels}
        return embeds.masked_scatter(mask, features), deepstack

    def _positions(self, inputs: dict, embeds: torch.Tensor, cache: Cache | None = None) -> torch.LongTensor | None:
        """The given positions, or those of the stock backbone, (3, B, T)."""
        if inputs["position_ids"] is not None:
            return inputs["position_ids"]
        return self.compute_3d_position_ids(
            input_ids=inputs["input_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            video_grid_thw=None,
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            **{CACHE: cache},
        )

    def _teach(
        self,
        boxes: torch.LongTensor,
        images: list[range],
        features: list[torch.Tensor],
        grids: list[tuple[int, int]],
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.BoolTensor]:
        """Lines 1-2, 15-16 and 20 of Algorithm 1, where each step has its own box.

        Args:
            boxes (`torch.LongTensor`): See [`boxes_by_step`].
            images (`list[range]`): See [`images_before`].
            features (`list[torch.Tensor]`): What BCM reads of each image of the batch, (L_i, D) or (L_i, 3D).
            grids (`list[tuple[int, int]]`): Their merged grids, h and w.

        Returns:
            `tuple`: Z_T (G, S, D), `None` without BCM; Â_T and the patches in the step's box (G, S, L).
        """
        pooling, device = self.config.region_pooling, features[0].device if features else None
        paths = boxes_by_step(boxes, self.config.num_latent_tokens).tolist()
        check_boxes(paths, images)

        # Side by side the features of a segment's boxes; of each box its place there, and the steps that look at it.
        segments, local, masks = [], [], []
        for path in paths:
            segment, pooled, blocks, step, column = [], [], [], 0, 0
            for (*corners, image), run in groupby(path):
                pooled.append(pool_region(features[image], corners, grids[image], pooling))
                blocks.append(torch.ones(len(list(run)), len(pooled[-1]), dtype=torch.bool))
                steps, columns = blocks[-1].shape
                segment.append((corners, image, slice(step, step + steps), slice(column, column + columns)))
                step, column = step + steps, column + columns
            segments.append(segment)
            local.append(torch.cat(pooled))
            masks.append(torch.block_diag(*blocks).T)
        mask = pad_sequence(masks, batch_first=True).transpose(1, 2).to(device)  # (G, S, N)
        if self.bcm is None:
            latents, attention = None, mask / mask.sum(2, keepdim=True)
        else:
            latents, attention = self.bcm(pad_sequence(local, batch_first=True), mask)

        lengths = [len(feature) for feature in features]
        most = max(sum(lengths[image] for image in before) for before in images)
        projected = attention.new_zeros(*mask.shape[:2], most)
        inside = torch.zeros(projected.shape, dtype=torch.bool, device=device)
        for number, (segment, before) in enumerate(zip(segments, images)):
            for corners, image, steps, columns in segment:
                first = sum(lengths[before.start : image])
                maps = project_attention(attention[number, steps, columns], corners, grids[image], pooling)
                projected[number, steps, first : first + lengths[image]] = maps
                inside[number, steps, first + box_patches(corners, grids[image]).to(device)] = True
        return latents, projected, inside

    def _run(
        self,
        inputs: dict,
        embeds: torch.Tensor,
        kwargs: dict,
        cache: Cache | None = None,
        use_cache: bool | None = False,
    ) -> BaseModelOutputWithPast:
        """One pass of the language model."""
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            **{CACHE: cache},
            use_cache=use_cache,
            **kwargs,
        )

    def _roll_out(
        self, inputs: dict, embeds: torch.Tensor, rows: torch.Tensor, first: torch.Tensor, kwargs: dict
    ) -> BaseModelOutputWithPast:
        """What decoding does (Sec. 3.4): the prompt into a cache, S single steps that feed each state back, then the rest.

        Without `attentions`, of which each step has as many columns as the cache.
        """
        if self.training and self.language_model.layers[0].gradient_checkpointing:
            raise ValueError(
                "Feeding the states back needs a cache, which gradient checkpointing forbids: set "
                "`gradient_checkpointing=False`, or another `latent_inputs`."
            )
        attention_mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
        if is_packed(position_ids):
            raise ValueError("Feeding the states back can't run on packed rows: turn `sample_packing` off.")
        if len(rows.unique()) < len(rows) or len(first.unique()) > 1:
            raise ValueError(
                "Feeding the states back needs one segment a row, all starting in one column (pad the prompts on the "
                f"left); the segments of rows {rows.tolist()} start at {first.tolist()}."
            )
        reflects = torch.zeros(len(embeds), 1, 1, dtype=torch.bool, device=embeds.device)
        reflects[rows] = True
        cache = DynamicCache(config=self.config.get_text_config())
        start, length = int(first[0]), embeds.shape[1]
        ends = [start, *range(start + 1, start + 1 + self.config.num_latent_tokens), length]
        states, layers, begin = [], [], 0
        for end in ends:
            chunk = embeds[:, begin:end]
            if start <= begin < start + self.config.num_latent_tokens:
                chunk = torch.where(reflects, states[-1][:, -1:], chunk)
            if begin < end:
                part = {
                    "attention_mask": None if attention_mask is None else attention_mask[:, :end],
                    "position_ids": None if position_ids is None else position_ids[..., begin:end],
                }
                outputs = self._run(part, chunk, deepstack_of_columns(kwargs, begin, end), cache, use_cache=True)
                states.append(outputs.last_hidden_state)
                layers.append(outputs.hidden_states or ())
            begin = end
        hidden_states = tuple(torch.cat(layer, 1) for layer in zip(*layers)) or None
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, 1), hidden_states=hidden_states)
