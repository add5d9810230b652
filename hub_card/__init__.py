"""A V-Reflection checkpoint without training it: asking, evaluating, converting, its card, publishing, the demo page."""


def __getattr__(name: str):
    if name == "__version__":
        from modeling_vreflection import __version__

        return __version__
    if name == "checkpoint_folder":
        from .inference.checkpoints import checkpoint_folder

        return checkpoint_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
