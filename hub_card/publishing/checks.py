"""What a folder must be before it is published."""

from pathlib import Path

from ..card import check_card
from ..inference.checkpoints import checkpoint_config
from .clean_process import try_checkpoint
from .files import find_files
from .leaks import check_leaks


def check_checkpoint(folder: Path) -> dict[str, Path]:
    """Checks all that can be checked without the Hub; the quick ones first.

    Returns:
        `dict[str, Path]`: The files to publish, by their names in the repository.

    Raises:
        InputError: No checkpoint; files that aren't published; local paths or secrets in one; a card that isn't complete;
            a checkpoint that doesn't load, or doesn't reflect, in a clean process.
    """
    checkpoint_config(folder)
    files = find_files(folder)
    check_leaks(files, folder)
    check_card(folder)
    try_checkpoint(folder)
    return files
