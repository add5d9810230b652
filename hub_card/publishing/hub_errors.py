"""What the Hub, or the way to it, says when it refuses, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..errors import InputError, first_line


# httpx's base class of all that can go wrong on the way; which httpx it is depends on the client's version.
TransportError = HfHubHTTPError.__mro__[1]
LOGIN = "run `hf auth login`, or set HF_TOKEN to one that may write"
MESSAGE_LENGTH = 500  # characters
BY_STATUS = {
    401: f"the Hub doesn't accept the token: {LOGIN}",
    403: "the token may not write there: is the name right?",
    404: "the Hub has no such namespace, repository or revision",
    412: "somebody else has committed meanwhile: run the command again",
    429: "too many requests for the Hub: wait, and run the command again",
}


@contextmanager
def hub_errors(repo_id: str, state: str = "nothing was changed") -> Iterator[None]:
    """Turns whatever the client raises into an `InputError` of one line about a repository, and how it is now."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a Hub that answers nonsense makes the client raise anything
        raise InputError(f"{repo_id}: {explain_hub_error(error)}; {state}") from error


def explain_hub_error(error: BaseException) -> str:
    """The reason, and what to do, in one line without the token."""
    while not isinstance(error, TransportError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client wraps what goes wrong in a thread
    return hide_token(find_reason(error))[:MESSAGE_LENGTH]


def find_reason(error: BaseException) -> str:
    """The line of `explain_hub_error`, of any length."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and publishing needs the Hub"
    if isinstance(error, HFValidationError):
        return f"no id on the Hub ({first_line(error)})"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({first_line(ValueError(error.server_message))})" if error.server_message else ""
        return BY_STATUS.get(status, f"the Hub fails with {status}") + said
    if isinstance(error, TransportError):
        return f"the Hub at {constants.ENDPOINT} can't be reached, or has stopped answering ({first_line(error)})"
    if isinstance(error, OSError | RuntimeError):
        return first_line(error)
    return f"the Hub's answer can't be understood ({type(error).__name__}: {first_line(error)})"


def hide_token(text: str) -> str:
    """A text without the token in use."""
    token = get_token()
    return text.replace(token, "hf_…") if token else text
