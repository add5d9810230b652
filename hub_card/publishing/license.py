"""What of a card only the Hub can check: its front matter, and whether its license fits the base model's."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..card import CARD, load_card
from ..errors import InputError
from .hub_errors import hub_errors


FIELDS = ("license", "license_name", "license_link")
# Licenses under which other licenses may be given to what is made of a model.
PERMISSIVE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense")


def check_license(folder: Path, api: HfApi, tell: Callable[[str], None] = print) -> None:
    """Asks the Hub whether it takes a card's front matter, and for the base model's license.

    A card without a license gets that of the base model, in the folder's `README.md`.

    Args:
        folder (`Path`): The checkpoint.
        api (`HfApi`): The Hub.
        tell (`Callable`): Takes a line about a license that was filled in.

    Raises:
        InputError: The Hub refuses the front matter; no license is known; the card's lifts what the base model's forbids.
    """
    card = load_card(folder)
    own = {name: card.data.get(name) for name in FIELDS}
    base, theirs = card.data.get("base_model"), dict.fromkeys(FIELDS)
    if isinstance(base, str):
        with hub_errors(base):
            try:
                data = api.model_info(base).card_data or {}
                theirs = {name: data.get(name) for name in FIELDS}
            except RepositoryNotFoundError:
                pass  # a base model that isn't public has no license to compare with
    label = theirs["license_name"] or theirs["license"]
    if own["license"] is None and theirs["license"] is None:
        raise InputError(f"{folder / CARD} names no license, and neither does its base model on the Hub: add one")
    if own["license"] is None:
        for name, value in theirs.items():
            setattr(card.data, name, value)
        card.save(folder / CARD)
        tell(f"Licence: {label}, that of {base}, is written into {CARD}.")
    elif theirs["license"] not in (None, *PERMISSIVE) and (own["license"], own["license_name"]) != (
        theirs["license"],
        theirs["license_name"],
    ):
        raise InputError(
            f"{base} is under the license {label}, so what is made of it can't be under "
            f"{own['license_name'] or own['license']}: correct {folder / CARD}"
        )
    with hub_errors(str(folder / CARD)):
        card.validate()
