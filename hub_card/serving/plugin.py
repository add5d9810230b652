"""Where vLLM finds V-Reflection: the entry point of `vllm.general_plugins`, called in each of its processes."""

ARCHITECTURES = ("VReflectionForConditionalGeneration", "VReflectionQwen3VLForConditionalGeneration")
NOT_SERVED = ("VReflectionQwen3VLMoeForConditionalGeneration",)


def register() -> None:
    """Adds V-Reflection's models, their settings and their renderer to vLLM's registries; may be called twice."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import modeling_vreflection  # noqa: F401, makes the configurations and processors known

    from .server_settings import RENDERER, NotServed, ServedSettings

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__package__}.served_models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = ServedSettings
    for architecture in NOT_SERVED:
        MODELS_CONFIG_MAP[architecture] = NotServed
    if RENDERER not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(RENDERER, f"{__package__}.prompt_renderer", "ReflectionRenderer")
        TokenizerRegistry.register(RENDERER, "vllm.tokenizers.hf", "CachedHfTokenizer")
