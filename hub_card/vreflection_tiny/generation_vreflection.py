"""What makes `generate` think in latents: who is in a reflection, which token is forced, what the streamer may show.

The state of a row is read off its tokens alone: S slots and the end token follow every start token. So rows of a batch
enter and leave a reflection at different steps, and beams carry their state along by being reordered.
"""

import warnings
from dataclasses import dataclass, fields

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .compression_vreflection import pad_features


LATENT_FEEDBACK = ("hidden", "dac")
# Arguments of `forward` that transformers would let through to it, where decoding has no use for them.
NOT_FOR_GENERATE = ("boxes", "latent_inputs", "bcm_receives_ce", "latent_state", "skip_logits", "labels")
# What `generate` and the language model call the key-value cache: `cache` from transformers 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass(frozen=True)
class ReflectionOptions:
    """How one call of `generate` reflects; see `VReflectionForConditionalGeneration.generate`."""

    latent_steps: int
    latent_feedback: str
    reflect: bool | None

    def __post_init__(self):
        if self.latent_steps < 0:
            raise ValueError(f"`latent_steps` must not be negative, got {self.latent_steps}.")
        if self.latent_feedback not in LATENT_FEEDBACK:
            raise ValueError(
                f"`latent_feedback` must be one of {', '.join(LATENT_FEEDBACK)}, got {self.latent_feedback!r}."
            )
        if self.reflect and not self.can_start:
            raise ValueError("`reflect=True` and `latent_steps=0` contradict each other: set `latent_steps` above 0.")

    @classmethod
    def resolve(cls, config, *generation_configs, latent_steps=None, latent_feedback=None, reflect=None):
        """The options of a call: an argument wins, then the first generation config that says something.

        Args:
            config (`VReflectionConfig`): The model's; where nothing is said, `latent_steps` is its `num_latent_tokens`.
            generation_configs (`GenerationConfig`): The call's, if there is one, then the model's.
            latent_steps, latent_feedback, reflect: See `generate`.

        Raises:
            ValueError: A value that isn't allowed, wherever it comes from.
        """

        def first(name: str, given, default):
            values = (given, *(getattr(generation_config, name, None) for generation_config in generation_configs))
            return next((value for value in values if value is not None), default)

        steps = first("latent_steps", latent_steps, config.num_latent_tokens)
        return cls(steps, first("latent_feedback", latent_feedback, LATENT_FEEDBACK[0]), reflect)

    @property
    def can_start(self) -> bool:
        """Whether a reflection may start at all; where not, this is the plain backbone."""
        return self.latent_steps > 0 and self.reflect is not False


def forced_tokens_left(input_ids: torch.LongTensor, start_id: int, latent_steps: int) -> torch.LongTensor:
    """For rows (B, T), counts the next tokens that are forced, slots and the end token: (B,), 0 outside of reflections."""
    recent = input_ids[:, -(latent_steps + 1) :] == start_id
    left = torch.arange(latent_steps + 2 - recent.shape[1], latent_steps + 2, device=input_ids.device)
    return (recent * left).sum(1)


class ReflectionProgress:
    """How far the rows are in their reflections, in one call of `generate`: read off the tokens once a step.

    Args:
        options (`ReflectionOptions`): The options of the call.
        start_id (`int`): Id of the start token.

    Attributes:
        left (`torch.LongTensor` of shape `(B,)`): Next tokens of each row that are forced; `None` where no row reflects.
        forced_steps (`int`): Next tokens that are known to be forced in all rows.
    """

    def __init__(self, options: ReflectionOptions, start_id: int):
        self.options = options
        self.start_id = start_id
        self.left: torch.LongTensor | None = None
        self.forced_steps = 0

    def read(self, input_ids: torch.LongTensor):
        """Brings itself up to tokens (B, T), one more than at the last call."""
        self.left = forced_tokens_left(input_ids, self.start_id, self.options.latent_steps)
        # Once all rows are known to be in a reflection, nothing needs to wait for the device until the first one leaves it.
        self.forced_steps -= self.forced_steps > 0
        if not self.forced_steps:
            self.forced_steps, most = torch.stack(self.left.aminmax()).tolist()
            if not most:
                self.left = None


class ReflectionTokenBan(LogitsProcessor):
    """Bans the slot and the end token outside of reflections, and the start token where none may start.

    Comes before the processors that keep only the likeliest tokens (`top_k`, `top_p`, `min_p`, `typical_p`), so that they
    never keep banned tokens alone.

    Args:
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        progress (`ReflectionProgress`): Of the call, up to the tokens that the scores follow.
    """

    def __init__(self, token_ids: tuple[int, int, int], progress: ReflectionProgress):
        self.start_id, self.latent_id, self.end_id = token_ids
        self.progress = progress

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.progress.forced_steps:  # in all rows: no score counts
            return scores
        scores = scores.clone()
        # No list of ids as an index: it would be copied to the device at every step.
        scores[:, self.latent_id] = scores[:, self.end_id] = float("-inf")
        if not self.progress.options.can_start:
            scores[:, self.start_id] = float("-inf")
        return scores


class ReflectionForcing(LogitsProcessor):
    """Forces `latent_steps` slots and the end token after every start token, and the start token for `reflect=True`.

    Must come last in the list, so that no other processor forbids what is forced.

    Args:
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        prompt_length (`int`): Tokens of the prompt.
        progress (`ReflectionProgress`): Of the call, up to the tokens that the scores follow.
    """

    def __init__(self, token_ids: tuple[int, int, int], prompt_length: int, progress: ReflectionProgress):
        self.start_id, self.latent_id, self.end_id = token_ids
        self.prompt_length = prompt_length
        self.progress = progress

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.progress.options.reflect and input_ids.shape[1] == self.prompt_length:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, self.start_id] = 0.0
            return scores
        left = self.progress.left
        if left is None:
            return scores
        forced = left > 0
        scores = scores.masked_fill(forced[:, None], float("-inf"))
        scores[:, self.latent_id] = torch.where(left > 1, 0.0, float("-inf"))
        scores[:, self.end_id] = torch.where(left == 1, 0.0, float("-inf"))
        return scores


class SilentReflectionStreamer(BaseStreamer):
    """Hands a streamer the prompt and the text, and keeps the tokens of reflections from it; of one row only.

    A streamer of several rows gets all tokens, since it can tell only by their place which row they belong to.

    Args:
        streamer (`BaseStreamer`): The user's streamer.
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
    """

    def __init__(self, streamer: BaseStreamer, token_ids: tuple[int, int, int]):
        self.streamer = streamer
        self.token_ids = torch.tensor(token_ids)
        self.prompt_is_next = True

    def put(self, value: torch.LongTensor):
        # Streamers that skip the prompt take whatever comes first for it.
        if not self.prompt_is_next and value.numel() == 1:
            value = value[~torch.isin(value, self.token_ids)]
        if self.prompt_is_next or value.numel():
            self.streamer.put(value)
        self.prompt_is_next = False

    def end(self):
        self.streamer.end()


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
        reflect: bool | None = None,
        **kwargs,
    ):
        """`GenerationMixin.generate`, which reflects where the model opens a reflection.

        The returned sequences hold a reflection's tokens, all special: `skip_special_tokens=True` drops them.

        Args:
            latent_steps (`int`, *optional*): S, steps of a reflection; 0 is the plain backbone. Defaults to the
                generation config's, else to `config.num_latent_tokens`.
            latent_feedback (`str`, *optional*): What a step feeds back: the `"hidden"` state (Sec. 3.4), or what the
                state queries from the images, `"dac"` (App. A.2). Defaults to the generation config's, else `"hidden"`.
            reflect (`bool`, *optional*): `True`: every answer begins with a reflection. `False`: none holds one.
                `None`: the model decides.

        Raises:
            ValueError: A mode that would silently do without latents: assisted decoding, prompt lookup,
                `use_cache=False`, continuous batching, tokens of a reflection in the prompt; no room for an answer.
        """
        if self.config.latent_token_id is None:
            raise ValueError(
                "The model has no latent tokens: make it with `from_backbone`, or call `add_latent_tokens`."
            )
        if given := [name for name in NOT_FOR_GENERATE if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate` has no use for `{given[0]}`, which is an argument of `forward`: leave it out."
            )
        given_config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        options = self.reflection_options(latent_steps, latent_feedback, reflect, given_config)
        prompt = args[0] if args else kwargs.get("inputs")
        self._check_prompt(kwargs.get("input_ids") if prompt is None else prompt)
        if options.can_start:
            if kwargs.get("assistant_model") is not None:
                raise ValueError(unsupported("assisted decoding (`assistant_model`)", "leave `assistant_model` out"))
            if options.latent_feedback == "dac" and kwargs.get("pixel_values_videos") is not None:
                raise ValueError("`latent_feedback='dac'` asks pictures, not videos: use `latent_feedback='hidden'`.")
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = SilentReflectionStreamer(kwargs["streamer"], self.config.latent_token_ids)
        progress = ReflectionProgress(options, self.config.latent_start_token_id)
        result = super().generate(*args, reflection=progress, **kwargs)
        if options.can_start:
            sequences = result if isinstance(result, torch.Tensor) else result.sequences
            left = forced_tokens_left(sequences, self.config.latent_start_token_id, options.latent_steps)
            cut = left.nonzero().flatten().tolist()
            if cut:
                warnings.warn(
                    f"Decoding ended within the reflection of rows {cut}: if the length limit cut it, raise `max_new_tokens`.",
                    stacklevel=3,
                )
        return result

    def _check_prompt(self, prompt: torch.Tensor | None):
        if prompt is None or prompt.is_floating_point():
            return
        found = torch.isin(prompt, prompt.new_tensor(self.config.latent_token_ids)).nonzero()[:, 0].unique().tolist()
        if found:
            raise ValueError(
                f"The prompts {found} hold tokens of a reflection, whose states are gone. The chat template drops past "
                "reflections; to begin with a new one, pass `reflect=True`."
            )

    def reflection_options(
        self,
        latent_steps: int | None = None,
        latent_feedback: str | None = None,
        reflect: bool | None = None,
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
        )
        if options.can_start and options.latent_feedback == "dac":
            if self.model.dac is None:
                raise ValueError(
                    "`latent_feedback='dac'` needs a checkpoint with DAC; use `latent_feedback='hidden'`."
                )
            if self.config.dac_queries != "states" or self.config.query_position != "before":
                raise ValueError(
                    "`latent_feedback='dac'` needs `dac_queries='states'` and `query_position='before'`; the checkpoint has "
                    f"{self.config.dac_queries!r} and {self.config.query_position!r}. Use `latent_feedback='hidden'`."
                )
        return options

    def _get_logits_processor(
        self,
        generation_config,
        *args,
        input_ids_seq_length=None,
        logits_processor=None,
        model_kwargs=None,
        **kwargs,
    ):
        # The one hook that sees the final generation config. transformers puts the list that it is given before the
        # processors that keep only the likeliest tokens; what it returns can be appended to.
        progress = model_kwargs["reflection"]
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
            room = generation_config.max_length - input_ids_seq_length
            if options.reflect and room < options.latent_steps + 3:
                raise ValueError(
                    f"`reflect=True` with {options.latent_steps} latent steps takes {options.latent_steps + 2} tokens; a "
                    f"limit of {room} new tokens leaves none for the answer. Raise `max_new_tokens`."
                )
        processors.append(ReflectionForcing(self.config.latent_token_ids, input_ids_seq_length, progress))
        return processors

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # Without latents an assistant may help; it knows nothing of them.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "reflection"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _expand_inputs_for_generation(self, *args, **kwargs):
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        progress = model_kwargs.get("reflection")
        if progress is not None and progress.options.can_start and progress.options.latent_feedback == "dac":
            model_kwargs["global_features"] = self._features_of_rows(input_ids, model_kwargs)
        return input_ids, model_kwargs

    def _features_of_rows(self, input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """All image features of each row (B, L, D) and their mask (B, L): what DAC interrogates while decoding."""
        features = self.model.image_features(
            model_kwargs.get("pixel_values"),
            model_kwargs.get("image_grid_thw"),
            model_kwargs.get("mm_encoder_outputs"),
        )
        counts = (input_ids == self.config.image_token_id).sum(1).tolist()
        if not features:
            raise ValueError(
                "`latent_feedback='dac'` asks the pictures at every latent step, and this call holds none: pass the whole "
                "prompt with its `pixel_values`, and no cache of an earlier call."
            )
        if not all(counts):
            raise ValueError(f"`latent_feedback='dac'` needs a picture in every row; row {counts.index(0)} has none.")
        return pad_features(list(torch.cat(features).split(counts)))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs["reflection"].options.can_start:
            # On the cache, since beam search reorders nothing else; a clone, since CUDA graphs reuse their memory.
            model_kwargs[CACHE].latent_state = outputs.last_hidden_state[:, -1:].clone()
        return model_kwargs

    def _reorder_cache(self, cache: Cache, beam_idx: torch.LongTensor) -> Cache:
        cache.reorder_cache(beam_idx)
        if hasattr(cache, "latent_state"):
            cache.latent_state = cache.latent_state.index_select(0, beam_idx)
        return cache

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        inputs_embeds=None,  # spelled out, else `generate` takes none
        reflection: ReflectionProgress | None = None,
        global_features=None,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if reflection is None or not reflection.options.can_start or kwargs.get("is_first_iteration"):
            return inputs
        reflection.read(input_ids)
        if reflection.left is None:
            return inputs
        state = kwargs[CACHE].latent_state
        if global_features is not None and (input_ids[:, -1] == self.config.latent_token_id).any():
            state = self.model.dac(state, *global_features)[0]
        return {**inputs, "latent_state": state, "skip_logits": reflection.forced_steps > 0}

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching (`generate_batch`, a paged cache) can't carry the latent states from step to step: call "
            "`generate` without `cache_implementation='paged'`."
        )


def unsupported(mode: str, remedy: str) -> str:
    """The message for a decoding mode that would lose the latents."""
    return f"{mode} can't carry the latent states from step to step: {remedy}, or set `latent_steps=0`."
