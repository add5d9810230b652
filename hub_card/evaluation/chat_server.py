"""A server of OpenAI's chat API, asked through the Hub's client, and what goes wrong with it in one line."""

import base64
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from modeling_vreflection.processing_vreflection import THINK_TOKENS

from ..errors import InputError, first_line
from ..publishing.hub_errors import MESSAGE_LENGTH, TransportError


HUGGING_FACE = ("huggingface.co", "huggingface.cloud")  # the latter: its Inference Endpoints
SENT_AGAIN = (429, 500, 502, 503, 504)
PAUSES = (1, 4)  # seconds
MODELS_TIMEOUT, ANSWER_TIMEOUT = 30, 600  # seconds


class ChatServer:
    """A server and the model that it is asked for.

    Args:
        url (`str`): Its address, e.g. `"http://localhost:8000/v1"`; `/v1` is added where it is missing.
        model (`str`, *optional*): The model's name there; without it, the only one that `GET /v1/models` lists.

    Raises:
        InputError: What is no such address; a server that can't be reached or fails; several models, or none, and no name.
    """

    def __init__(self, url: str, model: str | None = None):
        self.url = base_url(url)
        self._key_name, self._key = find_key(self.url)
        # Also where there is no key: left out, the client sends the Hub token of this machine. It drops what is `None`.
        self._headers = {"authorization": f"Bearer {self._key}" if self._key else None}
        self._client = InferenceClient(base_url=self.url, headers=self._headers, timeout=ANSWER_TIMEOUT)
        self.model = self._only_model() if model is None else model

    def answer(self, messages: list[dict], max_tokens: int, extra_body: dict[str, Any] | None = None) -> dict:
        """Asks for the greedy answer to a conversation whose pictures are open.

        Returns:
            `dict`: The `text`, without thoughts in words; its number of `tokens` as the server counts them, and its
            `finish_reason`, each `None` if the server doesn't say.

        Raises:
            InputError: A server that can't be reached, refuses or fails; an answer without text.
        """
        sent = chat_messages(messages)
        with self._errors():
            given = self._complete(sent, max_tokens=max_tokens, extra_body=extra_body)
            choice = given.choices[0]
            text, reason = choice.message.content, choice.finish_reason
            tokens = given.usage and given.usage.completion_tokens
        if text is None and reason == "length":  # all of the answer's tokens were thoughts
            text = ""
        if not isinstance(text, str):
            raise InputError(f"{self.url}: an answer has no text (finish_reason is {reason!r})")
        thinks, answers = THINK_TOKENS
        if text.lstrip().startswith(thinks) and answers not in text:  # cut within its thoughts
            text = ""
        return {"text": text.split(answers, 1)[-1].strip(), "tokens": tokens, "finish_reason": reason}

    def _complete(self, messages: list[dict], **options):
        """Sends a request, and again after each of `PAUSES` where the server is busy or failed, as OpenAI's client does."""
        for pause in (*PAUSES, None):
            try:
                return self._client.chat_completion(messages, model=self.model, temperature=0, **options)
            except HfHubHTTPError as error:
                if pause is None or error.response.status_code not in SENT_AGAIN:
                    raise
                time.sleep(pause)

    def _only_model(self) -> str:
        with self._errors():
            response = get_session().get(
                f"{self.url}/models",
                headers={name: value for name, value in self._headers.items() if value},
                timeout=MODELS_TIMEOUT,
            )
            missing = response.status_code in (404, 405, 501)
            names = [] if missing else [model["id"] for model in response.raise_for_status().json()["data"]]
        if len(names) != 1:
            found = f"offers {len(names)} models ({', '.join(names[:5])})" if names else "lists no models"
            raise InputError(f"{self.url}: the server {found}: name the one to ask")
        return names[0]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns whatever the client raises into an `InputError` of one line without the key."""
        try:
            yield
        except Exception as error:  # a server that answers nonsense makes the client raise anything
            reason = " ".join(self._reason(error).split())
            if self._key:
                reason = reason.replace(self._key, "…")
            raise InputError(f"{self.url}: {reason[:MESSAGE_LENGTH]}") from error

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and with it the client asks no server at all: unset it for this command"
        response = getattr(error, "response", None)
        if response is not None:
            said = server_message(response)
            if response.status_code == 401:
                refused = "refuses the key in" if self._key else "wants a key: set"
                return f"the server {refused} {self._key_name}{said and f' ({said})'}"
            return f"the server answers with status {response.status_code}{said and f': {said}'}"
        if isinstance(error, TransportError):
            return (
                f"the server can't be reached, or has stopped answering ({first_line(error) or type(error).__name__})"
            )
        return f"not an answer of OpenAI's API ({type(error).__name__}: {first_line(error)})"


def base_url(url: str) -> str:
    """The address up to `/v1`; an `InputError` for one that isn't `http(s)://HOST[:PORT][/PATH]`."""
    example = "give it like http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises for a bad one
    except ValueError as error:
        raise InputError(f"{url}: not a server's address ({error}): {example}") from error
    if parts.username or parts.password or parts.query or parts.fragment:  # not repeated, it may hold a secret
        raise InputError(
            f"a server's address holds no user, password or query, a key belongs into OPENAI_API_KEY: {example}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, url)):
        raise InputError(f"{url}: not a server's address: {example}")
    url = url.rstrip("/").removesuffix("/chat/completions")
    return url if url.endswith("/v1") else f"{url}/v1"


def find_key(url: str) -> tuple[str, str]:
    """The variable that holds a server's key, and the key, "" without one: a Hub token goes to Hugging Face alone."""
    host = urlsplit(url).hostname
    theirs = url.startswith("https:") and any(host == name or host.endswith(f".{name}") for name in HUGGING_FACE)
    name = "HF_TOKEN" if theirs else "OPENAI_API_KEY"
    return name, os.environ.get(name, "").strip()


def server_message(response) -> str:
    """What a server says about a failure: the message in its JSON, else its text unless that is a page."""
    try:
        said = response.json()
        said = said.get("error") or said.get("detail") or said.get("message") or ""
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        said = "" if response.text.lstrip().startswith("<") else response.text
    return str(said).strip()


def reflection_request(latent_steps: int | None, reflect: bool | None) -> dict[str, Any] | None:
    """The fields of a request in which vLLM hands options to its plugins, which can't be booleans; nothing where none is given."""
    given = {"latent_steps": latent_steps, "reflect": None if reflect is None else int(reflect)}
    given = {name: value for name, value in given.items() if value is not None}
    return {"vllm_xargs": given} if given else None


def chat_messages(messages: list[dict]) -> list[dict]:
    """A conversation in OpenAI's form: pictures as PNG in data URLs, bit for bit; turns of text alone as strings."""
    return [
        {
            **{name: value for name, value in message.items() if value is not None},
            "content": [chat_part(part) for part in message["content"]]
            if any(part["type"] == "image" for part in message["content"])
            else "".join(part["text"] for part in message["content"]),
        }
        for message in messages
    ]


def chat_part(part: dict) -> dict:
    """A part of a turn in OpenAI's form."""
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    part["image"].save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }
