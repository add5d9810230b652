"""What is looked at in each request before gradio acts on it."""

import json
import re
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from .uploaded_picture import MAX_BYTES, NO_PICTURE
from .uploads import Uploads


# Bytes of a request's body: an upload is one picture and a little around it, anything else is a question.
MAX_BODY = 2**16
MAX_UPLOAD_BODY = MAX_BYTES + MAX_BODY
# The ends of the paths that the page and gradio's client post to. Others leave files outside of the folder that is kept small.
POSTED_TO = re.compile(r"/(upload|queue/join|cancel|reset|(run|api|call|call/v2)/\w+)/?$")


class Page(gr.Blocks):
    """Blocks whose events get plain values and the sending visitor's own files only; see `Blocks` for the rest.

    gradio reads and downloads any file or URL that stands in any field, before the event's function sees it.
    """

    def __init__(self, uploads: Uploads, **options):
        self.uploads = uploads
        super().__init__(**options)

    async def process_api(self, block_fn, inputs, *, request=None, iterator=None, **options) -> dict[str, Any]:
        if iterator is None:  # else a running answer goes on
            visitor = request.session_hash if request else None
            inputs = [
                self.check_file(value, visitor) if isinstance(field, gr.Image) else check_plain(value)
                for field, value in zip(block_fn.inputs, inputs)
            ]
        return await super().process_api(block_fn, inputs, request=request, iterator=iterator, **options)

    def check_file(self, value: Any, visitor: str | None) -> dict[str, str]:
        """What a file's field holds, nothing but the path and the name."""
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or not self.uploads.allows(path, visitor):
            raise gr.Error(NO_PICTURE, print_exception=False)
        name = value.get("orig_name")
        name = name if name and isinstance(name, str) else Path(path).name
        return {"path": path, "orig_name": name}  # without `meta` gradio leaves the file alone


def check_plain(value: Any) -> str | float | None:
    """What any other field holds."""
    if value is not None and not isinstance(value, str | int | float):
        raise gr.Error(NO_PICTURE, print_exception=False)
    return value


class RequestGuard:
    """ASGI middleware: takes the page's own requests, bounds what they bring, notes uploads, and fetches no URL for anybody."""

    def __init__(self, app, uploads: Uploads):
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and "://" in scope["path"]:  # gradio's `/file=URL` is a proxy
            await PlainTextResponse("This page fetches nothing.", 403)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and not POSTED_TO.search(scope["path"]):
            await PlainTextResponse("This page takes no such request.", 403)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self.post(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def post(self, scope, receive, send) -> None:
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        taken, status = 0, None

        async def receive_bounded():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > (MAX_UPLOAD_BODY if is_upload else MAX_BODY):
                raise HTTPException(413, "This is more than the page takes.")
            return message

        async def send_noted(message):
            nonlocal status
            status = message.get("status", status)
            if is_upload and status == 200 and message.get("body"):  # a list of paths, in one piece
                self.uploads.add(json.loads(message["body"]))
            await send(message)

        try:
            await self.app(scope, receive_bounded, send_noted)
        finally:
            await run_in_threadpool(self.uploads.delete_oldest)
