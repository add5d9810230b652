"""Time-outs for the Hub's client, which waits without end for most answers. The smoke test's process runs this file alone."""

import os

from huggingface_hub import get_session, set_client_factory


TIMEOUT = 30


def set_timeouts() -> None:
    """Ends the client's requests in this process after 30 s without a byte, or `HF_HUB_DOWNLOAD_TIMEOUT`.

    Those with a time-out of their own keep it. What can be repeated, the client repeats.
    """
    session = get_session()
    hooks = session.event_hooks
    if limit_wait in hooks["request"]:
        return

    def make_client():  # with the client's own hooks; the class depends on the client's version
        return type(session)(
            event_hooks={**hooks, "request": [*hooks["request"], limit_wait]}, follow_redirects=True, timeout=None
        )

    set_client_factory(make_client)


def limit_wait(request) -> None:
    """Sets the time-outs that a request leaves open; many calls of the client pass `None`, so a default wouldn't do."""
    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or TIMEOUT)
    given = request.extensions["timeout"]
    request.extensions["timeout"] = {name: seconds if value is None else value for name, value in given.items()}
