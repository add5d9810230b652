"""Refuses prompts that no server of ours can answer, before a request reaches the engine: HTTP 400."""

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from .forced_tokens import ServedReflectionForcing
from .server_settings import served_options


class ReflectionRenderer(HfRenderer):
    """vLLM's renderer of Hugging Face tokenizers and chat templates."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        # In the process that admits requests: the one that makes renderers.
        ServedReflectionForcing.server = served_options(config.model_config)

    def validate_token_ids(self, token_ids, *, parameter=None):
        super().validate_token_ids(token_ids, parameter=parameter)
        try:
            ServedReflectionForcing.server.check_prompt(token_ids)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=parameter) from error
