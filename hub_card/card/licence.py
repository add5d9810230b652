"""Under which licence weights may be published: that of the model they began as binds them."""

from dataclasses import dataclass

from ..errors import InputError


CODE_LICENCE = "apache-2.0"
RESEARCH_LICENCE = "qwen-research"


@dataclass(frozen=True)
class Licence:
    """A licence in the Hub's terms.

    Args:
        id (`str`): An id of the Hub's list, or `other`.
        name (`str`, *optional*): With `other`: its name.
        link (`str`, *optional*): With `other`: where its text is.
        non_commercial (`bool`): Whether it forbids commercial use.
    """

    id: str
    name: str | None = None
    link: str | None = None
    non_commercial: bool = False

    @property
    def label(self) -> str:
        """What to call it in a text."""
        return self.name or self.id


APACHE = Licence(CODE_LICENCE)
BASE_LICENCES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": APACHE,
    "Qwen/Qwen2.5-VL-3B-Instruct": Licence(
        "other",
        RESEARCH_LICENCE,
        "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
        non_commercial=True,
    ),
}


def known_licence(base_model: str | None, from_scratch: bool) -> Licence | None:
    """The licence that follows from the base model; `None` for a base model that isn't known here."""
    return APACHE if from_scratch else BASE_LICENCES.get(base_model)


def choose_licence(base_model: str | None, from_scratch: bool, license: str | None = None) -> Licence:
    """The licence of a checkpoint: what the user says, else what follows from the base model.

    Raises:
        InputError: Neither says anything; or the user's would lift what the base model's licence forbids.
    """
    known = known_licence(base_model, from_scratch)
    if license is None:
        if known is None:
            base = "the base model is not known" if base_model is None else f"the licence of {base_model} is not known"
            raise InputError(
                f"{base} here: say under which licence this checkpoint is published, e.g. --license apache-2.0"
            )
        return known
    if known is not None and license in (known.id, known.name):
        return known
    if known is not None and known.non_commercial:
        raise InputError(
            f"{base_model} is under the licence {known.label}, so what is made of it can't be under {license}"
        )
    if license == "other":
        raise InputError("--license other says nothing: give an id of the Hub's list of licences")
    return Licence(license)
