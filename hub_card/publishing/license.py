"""What of a card only the Hub can check: its front matter, and whether its license fits the base model's."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..card import CARD, load_card
from ..errors import InputError
from .hub_errors import hub_errors


FIELDS = ("license", "license_name", "license_link")
# Licenses under which other licenses may be given to what is made of a model.
PERMISSIVE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense")


def check_license(folder: Path, api: HfApi) -> None:
    """Asks the Hub whether it takes a card's front matter, and for the base model's license, which a card without one gets.

    Raises:
        InputError: The Hub refuses the front matter; no license is known; the card's lifts what the base model's forbids.
    """
    card = load_card(folder)
    bases = card.data.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    license, name, _ = (card.data.get(field) for field in FIELDS)
    known = {base: license_of(base, api) for base in bases}
    # Of several the one that forbids most.
    base = min(known, key=lambda one: known[one]["license"] in (None, *PERMISSIVE), default=None)
    theirs = known.get(base, dict.fromkeys(FIELDS))
    base_license, base_name, _ = theirs.values()
    if license is None and base_license is None:
        raise InputError(f"{folder / CARD} names no license, and neither does its base model on the Hub: add one")
    if license is None:
        for field, value in theirs.items():
            setattr(card.data, field, value)
        card.save(folder / CARD)
        print(f"Licence: {base_name or base_license}, that of {base}, is written into {CARD}.")
    elif base_license not in (None, *PERMISSIVE) and (license, name) != (base_license, base_name):
        raise InputError(
            f"{base} is under the license {base_name or base_license}, so what is made of it can't be under "
            f"{name or license}: correct {folder / CARD}"
        )
    with hub_errors(str(folder / CARD)):
        card.validate()


def license_of(base: str, api: HfApi) -> dict[str, str | None]:
    """The fields of a base model's license, as the Hub has them; one that isn't public has none to compare with."""
    with hub_errors(base):
        try:
            data = api.model_info(base).card_data or {}
        except RepositoryNotFoundError:
            data = {}
    return {field: data.get(field) for field in FIELDS}
