"""A V-Reflection checkpoint without training it: asking, evaluating, converting, its card, publishing, the demo page."""


def __getattr__(name: str):
    if name == "__version__":
        from modeling_vreflection import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
