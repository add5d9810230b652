"""What makes `generate` think in latents: the hooks that feed them, step by step."""

import warnings
from dataclasses import fields
from inspect import signature

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .decoding_vreflection import (
    UNCERTAIN,
    ReflectionForcing,
    ReflectionOptions,
    ReflectionProgress,
    ReflectionTokenBan,
    SilentReflectionStreamer,
    forced_tokens_left,
)
from .processing_vreflection import refuse_other_media


# Arguments of `forward` that transformers would let through to it, where decoding has no use for them.
NOT_FOR_GENERATE = ("boxes", "latent_inputs", "bcm_receives_ce", "latent_state", "skip_logits", "labels")
# What `generate` and the language model call the key-value cache: `cache` from transformers 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


class ReflectionGenerationMixin:
    """The hooks of `GenerationMixin` that make a model reflect (Sec. 3.4); comes before the stock class.

    In one call of `generate`, transformers calls them in this order: `_get_logits_processor` and
    `_expand_inputs_for_generation` once; then at every step `prepare_inputs_for_generation`, which hands the state of the
    step before to `forward`, the logits processors, `_update_model_kwargs_for_generation`, which keeps the new state on the
    cache, and with beams `_reorder_cache`, which moves it along.
    """

    @torch.no_grad()
    def generate(
        self,
        *args,
        latent_steps: int | None = None,
        latent_feedback: str | None = None,
        reflect: bool | str | None = None,
        latent_tolerance: float | None = None,
        reflect_threshold: float | None = None,
        max_reflections: int | None = None,
        latents: torch.Tensor | None = None,
        latent_noise: float = 0.0,
        **kwargs,
    ):
        """`GenerationMixin.generate`, which reflects where the model opens a reflection.

        The returned sequences hold a reflection's tokens, all special: `skip_special_tokens=True` drops them. With
        `return_dict_in_generate=True` the output also holds `latents` (B, M, D), what was fed to the slots of each sequence,
        in their order and filled up with zeros; `latent_counts` (B,), how many there are; and with `"dac"`
        `latent_attention` (B, M, L), float32, where each looked, over the L merged patches of all images of the row. In
        `scores` and `logits` a forced token has the log-probability 0, so that an answer's is that of its free tokens.

        Args:
            latent_steps (`int`, *optional*): S, steps of a reflection; 0 is the plain backbone. Defaults to the
                generation config's, else to `config.num_latent_tokens`.
            latent_feedback (`str`, *optional*): What a step feeds back: the `"hidden"` state (Sec. 3.4), or what the
                state queries from the images, `"dac"` (App. A.2). Defaults to the generation config's, else `"hidden"`.
            reflect (`bool` or `str`, *optional*): `True`: every answer begins with a reflection, behind the thoughts of a
                backbone that thinks in words. `False`: none holds one. `"uncertain"`: one is forced in front of a token of the
                answer, thoughts excluded, whose entropy exceeds `reflect_threshold`, and the model starts none by itself.
                `None`: the generation config's; else the model decides.
            latent_tolerance (`float`, *optional*): With `"dac"`, a reflection ends before its S steps once the total
                variation between two consecutive looks, in [0, 1], falls below it. Defaults to the generation config's;
                0 is off.
            reflect_threshold (`float`, *optional*): With `"uncertain"`, in nats from 0 on; `inf` forces none. The entropy is
                that of the text token which would follow: tokens of a reflection and all that other processors ban left out,
                before temperature, `top_k` and `top_p`. Defaults to the generation config's.
            max_reflections (`int`, *optional*): With `"uncertain"`, how many an answer may hold, with a token of text between
                two of them. Defaults to the generation config's, else 1: as in training, and at the cost of `reflect=True`.
            latents (`torch.Tensor` of shape `(B, M, D)`, *optional*): Latents to feed instead of the model's own: the n-th
                slot of a prompt's answer is fed the n-th, and slots past the last the model's own.
            latent_noise (`float`, *optional*, defaults to 0.0): Standard deviation of the normal noise that is added to each
                value of what is fed: latents as actions, for training by reward.

        Raises:
            ValueError: A mode that would silently do without latents: assisted decoding, prompt lookup,
                `use_cache=False`, continuous batching, tokens of a reflection in the prompt; padding on the right; no room for
                an answer; videos; with `"uncertain"`, beams; with `"dac"`, pictures that this call doesn't hold, or `reflect=True` and a row without a
                picture.
        """
        if self.config.latent_token_id is None:
            raise ValueError(
                "The model has no latent tokens: make it with `from_backbone`, or call `add_latent_tokens`."
            )
        if given := [name for name in NOT_FOR_GENERATE if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate` has no use for `{given[0]}`, which is an argument of `forward`: leave it out."
            )
        kwargs = dict(**signature(super().generate).bind_partial(*args).arguments, **kwargs)
        given_config = kwargs.get("generation_config")
        options = self.reflection_options(
            latent_steps, latent_feedback, reflect, latent_tolerance, reflect_threshold, max_reflections, given_config
        )
        prompts = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((prompt for prompt in prompts if prompt is not None), None)
        refuse_other_media(**kwargs)
        self._check_prompt(prompt, kwargs.get("attention_mask"))
        if isinstance(kwargs.get("custom_generate"), str):
            raise ValueError(
                "`custom_generate` of a repository knows no reflections: pass a function, or leave it out."
            )
        if options.can_start and kwargs.get("assistant_model") is not None:
            raise ValueError(unsupported("assisted decoding (`assistant_model`)", "leave `assistant_model` out"))
        stored = (getattr(one, "stop_strings", None) for one in (given_config, self.generation_config))
        stops = kwargs.get("stop_strings") or next(filter(None, stored), None)
        if options.can_start and stops and kwargs.get("tokenizer") is not None:
            self._check_stop_strings([stops] if isinstance(stops, str) else stops, kwargs["tokenizer"])
        if latents is not None:
            self._check_latents(latents, prompt, options)
        if not 0 <= latent_noise < float("inf"):
            raise ValueError(f"`latent_noise` must be a finite number from 0 on, got {latent_noise!r}.")
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = SilentReflectionStreamer(kwargs["streamer"], self.config.latent_token_ids)
        config, grids = self.config, kwargs.get("image_grid_thw")
        progress = ReflectionProgress(
            options, config.latent_token_ids, grids, latents, config.think_end_token_id, latent_noise
        )
        result = super().generate(reflection=progress, **kwargs)
        if options.can_start:
            sequences = result if isinstance(result, torch.Tensor) else result.sequences
            cut = forced_tokens_left(sequences, *self.config.latent_token_ids[::2], options.latent_steps)
            if rows := cut.nonzero().flatten().tolist():
                warnings.warn(
                    f"Decoding ended within the reflection of rows {rows}: if the length limit cut it, raise `max_new_tokens`.",
                    stacklevel=3,
                )
        if not isinstance(result, torch.Tensor):
            embeddings, beam_indices = self.get_input_embeddings().weight, getattr(result, "beam_indices", None)
            if result.logits is not None and options.can_start:
                progress.settle_forced(result.logits, result.sequences, beam_indices)
            recorded = progress.recorded(result.sequences, beam_indices, embeddings)
            for name, value in recorded.items():
                result[name] = value
        return result

    def _check_prompt(self, prompt: torch.Tensor | None, attention_mask: torch.Tensor | None):
        if getattr(attention_mask, "ndim", 0) == 2 and attention_mask.shape[1] and not attention_mask[:, -1].all():
            raise ValueError("The prompts are padded on the right: set the tokenizer's `padding_side` to 'left'.")
        if prompt is None or prompt.is_floating_point():
            return
        if (prompt == self.config.video_token_id).any():
            raise ValueError("The prompts hold a video's tokens: V-Reflection looks at pictures, not videos.")
        found = torch.isin(prompt, prompt.new_tensor(self.config.latent_token_ids)).nonzero()[:, 0].unique().tolist()
        if found:
            raise ValueError(
                f"The prompts {found} hold tokens of a reflection, whose states are gone. The chat template drops past "
                "reflections; to begin with a new one, pass `reflect=True`."
            )

    def _check_stop_strings(self, strings: list[str], tokenizer):
        names = tokenizer.convert_ids_to_tokens(self.config.latent_token_ids)
        text = names[0] + 2 * names[1] + names[2]
        beginnings = tuple(text[:end] for end in range(1, len(text)))
        if inside := [string for string in strings if string in text or string.endswith(beginnings)]:
            raise ValueError(
                f"`stop_strings`: {inside[0]!r} ends within a reflection's tokens ({', '.join(names)}), which would end the "
                "answer. Choose another, or set `latent_steps=0`."
            )

    def _check_latents(self, latents: torch.Tensor, prompt: torch.Tensor | None, options: ReflectionOptions):
        if not options.can_start:
            raise ValueError(
                "`latents` are fed in reflections, and none may start: leave out `latent_steps=0` and `reflect=False`."
            )
        rows, size = 1 if prompt is None else len(prompt), self.config.get_text_config().hidden_size
        if latents.ndim != 3 or not latents.shape[1] or (len(latents), latents.shape[2]) != (rows, size):
            raise ValueError(f"`latents` must be ({rows}, at least 1, {size}), got {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` hold values that aren't finite (NaN or infinity).")

    def reflection_options(
        self,
        latent_steps: int | None = None,
        latent_feedback: str | None = None,
        reflect: bool | str | None = None,
        latent_tolerance: float | None = None,
        reflect_threshold: float | None = None,
        max_reflections: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> ReflectionOptions:
        """How `generate` reflects with these arguments, those left out taken from the generation configs.

        Raises:
            ValueError: Values that aren't allowed, contradict each other, or that this checkpoint can't follow.
        """
        options = ReflectionOptions.resolve(
            self.config,
            generation_config,
            self.generation_config,
            latent_steps=latent_steps,
            latent_feedback=latent_feedback,
            reflect=reflect,
            latent_tolerance=latent_tolerance,
            reflect_threshold=reflect_threshold,
            max_reflections=max_reflections,
        )
        if options.can_start:
            options.check_checkpoint(self.config)
        return options

    def _get_logits_processor(
        self, generation_config, *args, input_ids_seq_length=None, logits_processor=None, model_kwargs=None, **kwargs
    ):
        # The one hook that sees the final generation config. transformers puts the list that it is given before the
        # processors that keep only the likeliest tokens; what it returns can be appended to.
        progress = model_kwargs["reflection"]
        progress.prompt_length = input_ids_seq_length
        progress.recording = generation_config.return_dict_in_generate
        ban = ReflectionTokenBan(self.config.latent_token_ids, progress)
        processors = super()._get_logits_processor(
            generation_config,
            *args,
            input_ids_seq_length=input_ids_seq_length,
            logits_processor=[*(logits_processor or []), ban],
            model_kwargs=model_kwargs,
            **kwargs,
        )
        if logits_processor:  # one of the user's may keep only the likeliest tokens, too
            processors.insert(0, ban)
        options = progress.options
        if options.can_start:
            if generation_config.prompt_lookup_num_tokens is not None:
                raise ValueError(unsupported("prompt lookup decoding", "leave `prompt_lookup_num_tokens` out"))
            if generation_config.guidance_scale not in (None, 1):
                raise ValueError(unsupported("guidance (`guidance_scale`)", "leave `guidance_scale` out"))
            if not generation_config.use_cache:
                raise ValueError(unsupported("`use_cache=False`", "leave the cache on"))
            if options.reflect == UNCERTAIN and generation_config.num_beams > 1:
                raise ValueError(
                    f"`reflect='{UNCERTAIN}'` doesn't go with beams, which forced tokens lengthen at no cost: leave `num_beams` out."
                )
            room = generation_config.max_length - input_ids_seq_length
            if options.reflect and room < options.latent_steps + 3:
                raise ValueError(
                    f"`reflect={options.reflect!r}` with {options.latent_steps} latent steps takes {options.latent_steps + 2} tokens; a "
                    f"limit of {room} new tokens leaves none for the answer. Raise `max_new_tokens`."
                )
        processors.append(ReflectionForcing(self.config.latent_token_ids, progress))
        return processors

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # Without latents an assistant may help; it knows nothing of them.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "reflection"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        progress = model_kwargs.get("reflection")
        if progress is not None and progress.options.can_start:
            if progress.options.latent_feedback == "dac":
                self._look_up_pictures(progress, input_ids, model_kwargs)
            progress.expand(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _look_up_pictures(self, progress: ReflectionProgress, input_ids: torch.LongTensor, model_kwargs: dict):
        """Makes DAC's keys and values of all images of each row, once for the whole answer."""
        counts = (input_ids == self.config.image_token_id).sum(1)
        if progress.options.reflect is True and not counts.all():
            raise ValueError(
                "`latent_feedback='dac'` asks the pictures at every latent step, and `reflect=True` begins a reflection in "
                f"every row; row {counts.tolist().index(0)} has no picture. Give it one, or leave `reflect=True` out."
            )
        features = self.model.image_features(
            model_kwargs.get("pixel_values"),
            progress.image_grid_thw,
            model_kwargs.get("mm_encoder_outputs"),
        )
        cache = model_kwargs.get(CACHE)
        hidden = model_kwargs.get("inputs_embeds") is not None or (cache is not None and cache.get_seq_length() > 0)
        if hidden or sum(map(len, features)) != counts.sum():
            raise ValueError(
                "`latent_feedback='dac'` asks the pictures at every latent step, and this call doesn't hold them all: pass the "
                "whole prompt as `input_ids` with its `pixel_values`, and no cache of an earlier call; or use `reflect=False`."
            )
        progress.has_pictures = None if counts.all() else counts > 0
        if not features:
            return
        padded, mask = self.model.features_by_row(input_ids, features, progress.image_grid_thw)
        keys, values, places = self.model.dac.keys_and_values(padded)
        progress.pictures = (keys, values, None if places is None else places.to(keys.device), mask.to(keys.device))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs["reflection"].options.can_start:
            # On the cache, since beam search reorders nothing else. A clone, since CUDA graphs reuse their memory; contiguous,
            # since a compiled step is compiled anew for other strides, and those of the prompt's states are its length's.
            state = outputs.last_hidden_state[:, -1:].clone(memory_format=torch.contiguous_format)
            model_kwargs[CACHE].latent_state = state
        return model_kwargs

    def _reorder_cache(self, cache: Cache, beam_idx: torch.LongTensor) -> Cache:
        cache.reorder_cache(beam_idx)
        for name in ("latent_state", "latent_look"):
            if hasattr(cache, name):
                setattr(cache, name, getattr(cache, name).index_select(0, beam_idx))
        return cache

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        inputs_embeds=None,  # spelled out, else `generate` takes none
        reflection: ReflectionProgress | None = None,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if reflection is None or not reflection.options.can_start or kwargs.get("is_first_iteration"):
            return inputs
        reflection.read(input_ids)
        if not (reflection.in_slots or reflection.forced_steps):
            return inputs
        latents = kwargs[CACHE].latent_state
        if reflection.pictures is not None and reflection.in_slots:
            latents = self._look(latents, reflection, kwargs[CACHE])
        latents = reflection.feed(input_ids, latents)
        return {**inputs, "latent_state": latents, "skip_logits": reflection.forced_steps > 0}

    def _look(self, states: torch.Tensor, reflection: ReflectionProgress, cache: Cache) -> torch.Tensor:
        """What states (B, 1, D) see in the rows' pictures (B, 1, D)."""
        # With a model over several devices, DAC may be on another.
        latents, look = (seen.to(states.device) for seen in self.model.dac.attend(states, *reflection.pictures))
        look = look[:, 0]
        if reflection.options.latent_tolerance:
            if reflection.look is not None:  # else what the cache has is of an earlier call
                reflection.compare(look, cache.latent_look)
            cache.latent_look = look  # beside the state: beams move it, too
        reflection.look = look
        return latents

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching (`generate_batch`, a paged cache) can't carry the latent states from step to step: call "
            "`generate` without `cache_implementation='paged'`."
        )


def unsupported(mode: str, remedy: str) -> str:
    """The message for a decoding mode that would lose the latents."""
    return f"{mode} can't carry the latent states from step to step: {remedy}, or set `latent_steps=0`."
