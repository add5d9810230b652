"""What a server needs to be set to, and what it refuses at its start."""

import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .served_options import TESTED_VERSIONS, ServedOptions


# The name of the renderer that refuses prompts with tokens of a reflection; vLLM finds it by the tokenizer's mode.
RENDERER = "vreflection"


def served_options(model_config) -> ServedOptions:
    """The options of a server, from its checkpoint's generation config and `--override-generation-config`."""
    fields = model_config.try_get_generation_config()
    return ServedOptions(model_config.hf_config, model_config.override_generation_config, fields)


def pool_patches(vllm_config) -> int:
    """How many merged patches the pool of pictures holds: `--additional-config '{"picture_pool_patches": N}'`.

    By default as many as the longest prompt; fewer could not hold all pictures of such a prompt at once.
    """
    least = vllm_config.model_config.max_model_len
    additional = vllm_config.additional_config
    patches = additional.get("picture_pool_patches", least) if isinstance(additional, dict) else least
    if type(patches) is not int or patches < least:
        raise ValueError(
            f"`picture_pool_patches` must be at least the longest prompt's {least} tokens, got {patches!r}."
        )
    return patches


class ServedSettings(VerifyAndUpdateConfig):
    """Sets up vLLM for our models; called by vLLM when it has read the configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        if Version(vllm.__version__).base_version not in SpecifierSet(TESTED_VERSIONS):
            raise ValueError(f"V-Reflection was tested with vLLM {TESTED_VERSIONS}, and this is {vllm.__version__}.")
        # A list that the user gave stays in front: what a reflection forces must come last.
        ours = f"{__package__}.forced_tokens:ServedReflectionForcing"
        model_config.logits_processors = [*(model_config.logits_processors or []), ours]
        model_config.tokenizer_mode = RENDERER

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        options = served_options(vllm_config.model_config)
        for setting, remedy in refused_settings(vllm_config, options.uses_dac):
            raise ValueError(f"V-Reflection can't be served with {setting}: {remedy}.")
        if options.uses_dac:
            pool_patches(vllm_config)


def refused_settings(vllm_config, uses_dac: bool) -> list[tuple[str, str]]:
    """Settings that would lose latents or looks, each with what to do instead."""
    model, parallel, lora = vllm_config.model_config, vllm_config.parallel_config, vllm_config.lora_config
    multimodal = model.multimodal_config
    refused = [
        (
            not vllm_config.use_v2_model_runner,
            "vLLM's V1 model runner",
            "install Triton, set VLLM_USE_V2_MODEL_RUNNER=1",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism", "use tensor parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "use tensor parallelism"),
        (parallel.enable_batch_sharded_sampling, "batch-sharded sampling", "leave it off"),
        (vllm_config.speculative_config is not None, "speculative decoding", "leave it off"),
        (vllm_config.scheduler_config.policy != "fcfs", "priority scheduling", "use `--scheduling-policy fcfs`"),
        (vllm_config.kv_transfer_config is not None, "KV transfer, which could mix feedbacks", "leave it off"),
        (vllm_config.ec_transfer_config is not None, "encoder disaggregation", "leave it off"),
        (model.enable_prompt_embeds, "prompt embeddings", "leave `--enable-prompt-embeds` out"),
        (model.enable_trace_replay, "trace replay", "leave `--enable-trace-replay` out"),
        (uses_dac and multimodal.enable_mm_embeds, "picture embeddings and DAC", "leave `--enable-mm-embeds` out"),
        (
            uses_dac and multimodal.mm_encoder_tp_mode == "data",
            "a data-parallel vision encoder and DAC",
            "use 'weights'",
        ),
        (
            uses_dac and lora is not None and lora.enable_tower_connector_lora,
            "LoRA of the vision encoder and DAC",
            "leave `--enable-tower-connector-lora` out",
        ),
    ]
    return [(setting, remedy) for found, setting, remedy in refused if found]


class NotServed(VerifyAndUpdateConfig):
    """Of architectures that vLLM would otherwise serve by transformers' own code, without latents."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        raise ValueError(f"{model_config.architecture} isn't served by vLLM yet: use `transformers serve`.")
