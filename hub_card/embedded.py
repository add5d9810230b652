"""The checkpoint that comes with the package, by the one name that commands, recipes and `checkpoint_folder` take for it."""

from pathlib import Path


EMBEDDED_NAME = "vreflection_tiny"
EMBEDDED = Path(__file__).parent / EMBEDDED_NAME


def resolve_embedded(model: str | Path) -> str:
    """The embedded checkpoint's folder for its name, other names as they are.

    A folder `vreflection_tiny` in the working directory comes first, as folders do before Hub ids in `from_pretrained`.
    """
    return str(EMBEDDED if str(model) == EMBEDDED_NAME and not Path(model).exists() else model)


def is_embedded(model: str | Path) -> bool:
    """Whether this is the embedded checkpoint's folder."""
    return Path(model).exists() and EMBEDDED.exists() and Path(model).samefile(EMBEDDED)
