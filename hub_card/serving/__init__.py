"""A plugin for vLLM: reflections decoded by its own runner, through its registry of models; see `docs/serving.md`."""
