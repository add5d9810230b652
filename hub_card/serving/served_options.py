"""What a server and its requests may ask of reflections; needs no vLLM."""

import threading
from collections.abc import Mapping
from types import SimpleNamespace

from modeling_vreflection.decoding_vreflection import UNCERTAIN, ReflectionOptions


# What a request may set in `vllm_xargs` (over HTTP) or `extra_args`; all else of it is of other extensions.
REQUEST_OPTIONS = ("latent_steps", "reflect", "latent_tolerance")
# Of a request's sampling parameters, what would forbid, overwrite or cut short the tokens that a reflection forces.
CONTRADICTING = ("structured_outputs", "thinking_token_budget", "trace_decode_token_ids", "repetition_detection")
TESTED_VERSIONS = ">=0.32,<0.33"


class ServedOptions:
    """The options of a server: the generation config's, from which each request's are made.

    Args:
        config (`VReflectionConfig`): The checkpoint's.
        generation_configs (`dict`): The fields of `--override-generation-config`, then those of the checkpoint's file.

    Raises:
        ValueError: A checkpoint or a generation config that can't reflect.
    """

    def __init__(self, config, *generation_configs: Mapping):
        if config.latent_token_id is None:
            raise ValueError("The model has no latent tokens: make it with `vreflection convert`.")
        self.config = config
        self.generation_configs = [SimpleNamespace(**fields) for fields in generation_configs]
        self.admitted = threading.local()
        options = self.of_request({})
        self.latent_feedback = options.latent_feedback
        if self.uses_dac:
            options.check_checkpoint(config)

    @property
    def uses_dac(self) -> bool:
        """Whether latents are DAC's; a server has one feedback, so that cached prefixes hold latents of one kind."""
        return self.latent_feedback == "dac"

    def of_request(self, extra_args: Mapping | None) -> ReflectionOptions:
        """The options of a request with these extra arguments.

        Raises:
            ValueError: A value that `generate` wouldn't take; `latent_feedback`, which is the server's.
        """
        given = {name: (extra_args or {})[name] for name in REQUEST_OPTIONS if name in (extra_args or {})}
        if "latent_feedback" in (extra_args or {}):
            raise ValueError("`latent_feedback` is the server's: set it there, by `--override-generation-config`.")
        if type(given.get("reflect")) is int and given["reflect"] in (0, 1):  # HTTP's extra arguments know no booleans
            given["reflect"] = bool(given["reflect"])
        if UNCERTAIN in (
            given.get("reflect"),
            *(getattr(stored, "reflect", None) for stored in self.generation_configs),
        ):
            raise ValueError(
                f"`reflect='{UNCERTAIN}'` isn't served by vLLM: set it to 0 or 1, or use `transformers serve`."
            )
        return ReflectionOptions.resolve(self.config, *self.generation_configs, **given)

    def check_request(self, params) -> ReflectionOptions:
        """The options of a request, which its other sampling parameters must not contradict.

        Args:
            params (`vllm.SamplingParams`): The request's.

        Raises:
            ValueError: A wrong option; a parameter that reflections can't follow; no room for an answer.
        """
        self.admitted.options = options = self.of_request(params.extra_args)
        if not options.can_start:
            return options
        for name in CONTRADICTING:
            if getattr(params, name, None) is not None:
                raise ValueError(f"`{name}` can't be combined with a reflection: leave it out, or set `reflect` to 0.")
        if not params.skip_special_tokens:
            raise ValueError(
                "`skip_special_tokens=False` would show a reflection's placeholders: leave it out, or set `reflect` to 0."
            )
        if options.reflect and params.max_tokens is not None and params.max_tokens < options.latent_steps + 3:
            raise ValueError(
                f"`reflect` with {options.latent_steps} latent steps takes {options.latent_steps + 2} tokens; a limit of "
                f"{params.max_tokens} new tokens leaves none for the answer. Raise `max_tokens`."
            )
        return options

    def check_prompt(self, token_ids: list[int]) -> None:
        """Raises a `ValueError` for a prompt that holds tokens of a reflection, or has nothing to look at and must.

        vLLM calls `check_request` and this for one request after the other, in one thread.
        """
        check_slots(self.config, token_ids)
        options = self.admitted.__dict__.pop("options", None)
        if options and options.reflect and self.uses_dac and self.config.image_token_id not in token_ids:
            raise ValueError(
                "`latent_feedback='dac'` asks the pictures at every latent step, and `reflect` begins with a reflection; the "
                "prompt has no picture. Give it one, or set `reflect` to 0."
            )


def check_slots(config, token_ids: list[int]) -> None:
    """Raises a `ValueError` for a prompt that holds tokens of a reflection."""
    if not set(config.latent_token_ids).isdisjoint(token_ids):
        raise ValueError(
            "The prompt holds tokens of a reflection, whose states are gone. To begin with a new one, set `reflect` to 1."
        )
