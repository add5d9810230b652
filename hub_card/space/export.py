"""A folder that a Space on the Hub can run: the page's main file and the two packages beside it."""

import shutil
from pathlib import Path

import modeling_vreflection

from ..conversion.folders import atomic_directory
from ..errors import InputError


HERE = Path(__file__).parent
ROOT_FILES = ("app.py", "requirements.txt", "README.md")


def export_space(folder: Path) -> None:
    """Writes the folder, which `hf upload --repo-type space` takes as it is.

    Raises an `InputError` for a file, or a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; name a folder that is empty or doesn't exist")
    packages = {
        "modeling_vreflection": Path(modeling_vreflection.__file__).parent,
        "vreflection_hub_card": HERE.parent,
    }
    with atomic_directory(folder) as draft:
        for name, source in packages.items():
            shutil.copytree(source, draft / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in ROOT_FILES:
            shutil.copy2(HERE / name, draft / name)
