"""The YAML files that come with the package: recipes, and configurations of accelerate."""

from pathlib import Path

from vreflection_hub_card.errors import InputError


RECIPES = Path(__file__).parent / "recipes"
ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate"


def shipped(folder: Path) -> str:
    """Names of the YAML files that come with the package."""
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def find_file(name: str, folder: Path, what: str) -> Path:
    """A YAML file: a path, or the name of one that comes with the package.

    Raises:
        InputError: There is no such file.
    """
    for path in (Path(name), folder / f"{name}.yaml", folder / Path(name).name):
        if path.is_file():
            return path
    raise InputError(f"No {what} {name!r}. With the package come: {shipped(folder)}.")
