"""What the Hub, or the way to it, says when it refuses, in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import InputError
from ..inference.checkpoints import first_line


# httpx's base class of all that can go wrong on the way; which httpx it is depends on the client's version.
TransportError = HfHubHTTPError.__mro__[1]
SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]+")
NO_TOKEN = "no Hub token: run `hf auth login`, or set HF_TOKEN to one that may write"


@contextmanager
def one_line(repo_id: str, state: str = "nothing was changed") -> Iterator[None]:
    """Turns an error of the client into one line about a repository, and how it is now; never with the token in it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, TransportError) as error:
        raise InputError(f"{repo_id}: {SECRET.sub('hf_…', explain(error, repo_id, state))}") from error


def explain(error: BaseException, repo_id: str, state: str) -> str:
    """The reason, and what to do."""
    while not isinstance(error, TransportError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client wraps what goes wrong in a thread
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; publishing needs the Hub"
    if isinstance(error, HFValidationError):
        return f"no id on the Hub ({first_line(error)})"
    if isinstance(error, JSONDecodeError):
        return f"the Hub's answer can't be understood; {state}, run the command again later"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, TransportError):
            return f"the Hub at {constants.ENDPOINT} can't be reached ({first_line(error)})"
        return first_line(error)
    status = error.response.status_code
    said = f" ({first_line(ValueError(error.server_message))})" if error.server_message else ""
    namespace = repo_id.partition("/")[0]
    if status == 401:
        return f"the Hub doesn't accept the token{said}: run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"the token may not write to {namespace}{said}: is the name right, and may the token write there?"
    if status == 404:
        return f"the Hub has no such namespace or repository{said}"
    if status == 412:
        return "somebody else has committed meanwhile; nothing was changed, run the command again"
    if status == 429:
        return "too many requests for the Hub; wait, and run the command again"
    if status >= 500:
        return f"the Hub fails with {status}{said}; {state}, run the command again later"
    return first_line(ValueError(error.server_message or str(error)))
