"""The page over raw HTTP: what a visitor may ask about, and what all visitors together may take."""

import io
import json
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.space.uploaded_picture import MAX_BYTES, NO_PICTURE


META = {"meta": {"_type": "gradio.FileData"}}
OPTIONS = ["Where?", 1, "hidden", False, False]


class RawVisitor:
    """A visitor without a browser; each has a session of its own."""

    def __init__(self, address):
        self.api = f"{address}gradio_api/"
        self.session = uuid.uuid4().hex
        with urllib.request.urlopen(f"{address}config") as reply:
            self.config = json.load(reply)
        self.events = {event["api_name"]: event for event in self.config["dependencies"]}

    def request(self, path, body, kind="application/json"):
        """The status and the text of the reply."""
        request = urllib.request.Request(self.api + path, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def upload(self, content, name="mine.png", count=1):
        if isinstance(content, Image.Image):
            buffer = io.BytesIO()
            content.save(buffer, "png")
            content = buffer.getvalue()
        head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = b"".join(head + content + b"\r\n" for _ in range(count)) + b"--X--\r\n"
        return self.request("upload", body, "multipart/form-data; boundary=X")

    def uploaded(self, *arguments):
        status, reply = self.upload(*arguments)
        assert status == 200, reply
        return json.loads(reply)[0]

    def send(self, event, data, path="queue/join"):
        body = {"data": data, "fn_index": self.events[event]["id"], "session_hash": self.session}
        return self.request(path, json.dumps(body).encode())

    def queued(self, event, data):
        """The messages of an event, joined to the queue and read to its end."""
        status, reply = self.send(event, data)
        assert status == 200, reply
        messages = []
        # A reply in time is part of what is tested: nothing may keep the others waiting.
        with urllib.request.urlopen(f"{self.api}queue/data?session_hash={self.session}", timeout=15) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    messages.append(json.loads(line[5:]))
                if messages and messages[-1]["msg"] == "process_completed":
                    return messages
        raise AssertionError(messages)

    def error(self, event, data):
        """The message that an event ends with."""
        last = self.queued(event, data)[-1]
        assert not last["success"], last
        return last["output"]["error"]

    def ask(self, payload, steps=1):
        """Asks, and returns whether both answers came."""
        messages = self.queued("answer_question", [payload, OPTIONS[0], steps, *OPTIONS[2:]])
        assert messages[-1]["success"], messages[-1]
        return len(messages) > 5

    def slide(self, number):
        inputs = self.events["show_step"]["inputs"]
        status, reply = self.send("show_step", [number] + [None] * (len(inputs) - 1), "run/predict")
        return json.loads(reply)


@pytest.fixture
def mine(page):
    """A visitor, and the path of a picture that is the visitor's own."""
    visitor = RawVisitor(page[0])
    path = visitor.uploaded(draw_question("test", 5)[0].image, f"{visitor.session}.png")
    assert visitor.ask({"path": path, **META})
    return visitor, path


@pytest.fixture
def forbidden(mine, page, tmp_path):
    """What a visitor may not name, some of it beside the visitor's own upload."""
    path = Path(mine[1])
    picture = draw_question("test", 6)[0].image
    picture.save(tmp_path / "server.png")
    other = RawVisitor(page[0])
    theirs = other.uploaded(picture, f"{other.session}.png")
    assert other.ask({"path": theirs, **META})
    link, pipe, planted = (path.with_name(f"{kind}-{path.name}") for kind in ("link", "pipe", "planted"))
    link.symlink_to(tmp_path / "server.png")
    os.mkfifo(pipe)
    picture.save(planted)
    return {
        "a picture of the server": str(tmp_path / "server.png"),
        "a missing picture": str(tmp_path / "missing.png"),
        "another visitor's": theirs,
        "a link": str(link),
        "a pipe": str(pipe),
        "nobody's upload": str(planted),
        "standard output": "/proc/self/fd/1",
        "no end": "/dev/zero",
        "a folder": str(path.parent),
        "relative": os.path.relpath(path),
        "dots": f"{path.parent}/../{path.parent.name}/{path.name}",
        "dots out": f"{path.parent}/../../../../../../../..{tmp_path}/server.png",
        "a URL": "http://127.0.0.1:9/server.png",
        "a file URL": f"file://{tmp_path}/server.png",
        "data": "data:image/png;base64,iVBORw0KGgo=",
        "a null byte": f"{path}\0",
        "long": "x" * 50_000,
        "empty": "",
        "a number": 3,
        "a list": [str(path)],
    }


@pytest.mark.parametrize("event", ["answer_question", "check_upload"])
def test_only_a_visitors_own_upload_is_opened(mine, forbidden, page, event):
    visitor, path = mine
    options = OPTIONS if event == "answer_question" else []
    payloads = {
        f"{name}, {kind}": {"path": value, **extra}
        for name, value in forbidden.items()
        for kind, extra in {"bare": {}, "meta": META, "stream": {**META, "is_stream": True}}.items()
    }
    own = {"path": path, **META}
    payloads |= {"none": None, "text": path, "number": 3, "list": [own], "nested": {"image": own}, "no path": META}
    payloads |= {"url only": {"url": f"{page[0]}gradio_api/file={path}", **META}, "meta": {"path": "/x", "meta": 3}}
    wrong = {}
    for name, payload in payloads.items():
        error = visitor.error(event, [payload, *options])
        if error != NO_PICTURE:
            wrong[name] = error
    assert wrong == {}
    assert visitor.ask({"path": path, "url": "http://127.0.0.1:9/x", "orig_name": 3})  # the rest of it isn't looked at
    assert "Traceback" not in page[1]()


def test_a_file_in_another_field_is_refused(mine, forbidden):
    visitor, path = mine
    for where in range(1, 5):
        data = [{"path": path, **META}, *OPTIONS]
        data[where] = {"path": forbidden["a URL"], **META}
        assert visitor.error("answer_question", data) == NO_PICTURE
    assert NO_PICTURE in json.dumps(visitor.slide({"path": forbidden["a URL"], **META}))


def test_an_upload_that_became_something_else_is_not_followed(mine, forbidden):
    visitor, path = mine
    for kind in ("a link", "a pipe"):
        os.replace(forbidden[kind], path)
        assert visitor.error("answer_question", [{"path": path, **META}, *OPTIONS]) == NO_PICTURE
    os.remove(path)
    assert visitor.error("answer_question", [{"path": path, **META}, *OPTIONS]) == NO_PICTURE


def test_equal_uploads_belong_to_each_who_uploaded(page):
    picture = draw_question("test", 8)[0].image
    visitors = [RawVisitor(page[0]) for _ in range(3)]
    paths = {visitor.uploaded(picture, "same.png") for visitor in visitors[:2]}
    payload = {"path": paths.pop(), **META}
    assert not paths  # gradio keeps them as one
    assert visitors[0].ask(payload) and visitors[1].ask(payload) and visitors[0].ask(payload)
    assert visitors[2].error("answer_question", [payload, *OPTIONS]) == NO_PICTURE


def test_the_examples_are_everybodys(page):
    visitor = RawVisitor(page[0])
    (dataset,) = visitor.events["load_example"]["inputs"]
    count = len(next(c for c in visitor.config["components"] if c["id"] == dataset)["props"]["samples"])
    assert count == 6
    for number in range(count):
        picture = json.loads(visitor.send("load_example", [number], "run/predict")[1])["data"][0]
        payload = picture.get("value", picture)
        assert visitor.queued("check_upload", [payload])[-1]["success"]
    assert visitor.ask(payload)


def test_no_endpoint_skips_the_queue(mine):
    visitor, path = mine
    for event in ("answer_question", "check_upload"):
        for route in ("run/predict", "api/predict", f"run/{event}"):
            assert visitor.send(event, [{"path": path, **META}, *OPTIONS], route)[0] == 404
    status, reply = visitor.request("call/answer_question", json.dumps({"data": ["/etc/x.png", *OPTIONS]}).encode())
    with urllib.request.urlopen(
        f"{visitor.api}call/answer_question/{json.loads(reply)['event_id']}", timeout=10
    ) as got:
        assert NO_PICTURE in json.dumps(json.loads(got.read().split(b"data: ")[1]))


def test_postscript_is_not_run(page):
    visitor = RawVisitor(page[0])
    endless = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n{} loop\n%%EOF\n"
    path = visitor.uploaded(endless, f"{visitor.session}.png")
    assert "not a picture" in visitor.error("answer_question", [{"path": path, **META}, *OPTIONS])


def test_who_does_not_read_the_answer_stops_nobody(mine, page):
    visitor, path = mine
    assert RawVisitor(page[0]).send("answer_question", [{"path": path, **META}, *OPTIONS])[0] == 200
    assert visitor.send("answer_question", [{"path": path, **META}, *OPTIONS])[0] == 200
    other = RawVisitor(page[0])
    assert other.ask({"path": other.uploaded(draw_question("test", 7)[0].image), **META})


@pytest.mark.parametrize("question", [3, ["Where?"], None, "x" * 1001])
def test_a_question_of_the_wrong_kind_gets_a_message(mine, question):
    visitor, path = mine
    message = visitor.error("answer_question", [{"path": path, **META}, question, *OPTIONS[1:]])
    assert message in (NO_PICTURE, "Ask a question about the picture.") or "1001 characters" in message


@pytest.mark.parametrize("number", [2, 9, -1, 1.5, "1", None, "x"])
def test_a_step_that_is_not_there_gets_a_message(mine, number):
    visitor, _ = mine
    assert visitor.slide(1)["data"]
    assert "Ask again" in visitor.slide(number)["error"]
    assert "Ask again" in RawVisitor(visitor.api.removesuffix("gradio_api/")).slide(1)["error"]  # others see nothing


def test_the_page_fetches_nothing_for_anybody(page):
    for path in (
        "file=http://198.51.100.1/x.png",
        "file=https://example.org/",
        "proxy=https://x.hf.space/",
        "file/http://x",
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{page[0]}gradio_api/{path}", timeout=5)
        assert error.value.code == 403 and "fetches nothing" in error.value.read().decode()


def test_other_paths_take_nothing(page):
    visitor = RawVisitor(page[0])
    field = b'--X\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nabc\r\n--X--\r\n'
    before = set(os.listdir(tempfile.gettempdir()))
    for path in ("process_recording", "component_server", "upload/../process_recording"):
        assert visitor.request(path, field, "multipart/form-data; boundary=X")[0] == 403
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("tmp")]


def test_large_requests_end(page):
    visitor = RawVisitor(page[0])
    assert visitor.send("answer_question", [None, "x" * 2**17, *OPTIONS[1:]])[0] in (400, 413)
    assert visitor.upload(bytes(MAX_BYTES // 2 + 2**16), "half.png", 2)[0] == 413
    field = b'--X\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + bytes(MAX_BYTES + 2**17) + b"\r\n--X--\r\n"
    assert visitor.request("upload", field, "multipart/form-data; boundary=X")[0] == 413


@pytest.fixture(scope="module")
def small_page(served, free_port, tmp_path_factory):
    """The address of a page that keeps little, and its folder."""
    pytest.importorskip("gradio", reason='needs pip install "vreflection[space]"')
    folder, port = tmp_path_factory.mktemp("small"), free_port()
    small = "from vreflection_hub_card.space import frames, uploads; frames.MAX_MEMORY = 6_000_000; uploads.MAX_DISK = 2**20"
    run = f"from vreflection_training.cli import main; main(['space', '--device', 'cpu', '--port', '{port}'])"
    address = f"http://127.0.0.1:{port}/"
    with served(
        [sys.executable, "-c", f"{small}; {run}"], address, folder / "log", GRADIO_TEMP_DIR=str(folder / "files")
    ):
        yield address, folder / "files"


@pytest.mark.slow
def test_the_oldest_visitors_frames_go(small_page):
    visitors = []
    for number in range(5):
        visitors.append(RawVisitor(small_page[0]))
        path = visitors[-1].uploaded(draw_question("test", number)[0].image)
        assert visitors[-1].ask({"path": path, **META}, steps=8)
    kept = ["data" in visitor.slide(1) for visitor in visitors]
    assert kept == [False, False, True, True, True]  # a picture of 720 x 720 pixels takes 1.6 MB
    assert "Ask again" in visitors[0].slide(1)["error"]


def abandon_uploads(address, count, size):
    """Breaks uploads off; gradio leaves what had come."""
    host, port = address.removeprefix("http://").strip("/").split(":")
    part = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size)
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {2 * len(part)}\r\n"
    for _ in range(count):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=X\r\n\r\n" + part)


def disk_usage(folder):
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # gone meanwhile
                total += os.path.getsize(os.path.join(place, name))
    return total


@pytest.mark.slow
def test_the_oldest_files_go(small_page):
    address, folder = small_page
    visitor = RawVisitor(address)
    picture = draw_question("test", 9)[0].image
    first = visitor.uploaded(picture, "first.png")
    assert visitor.ask({"path": first, **META})
    abandon_uploads(address, 4, 200_000)
    for number in range(12):
        last = visitor.uploaded(os.urandom(200_000), f"{number}.png")
    deadline = time.monotonic() + 10  # files go after the reply
    while (taken := disk_usage(folder)) > 2**20 + 200_000:  # the examples stay
        assert time.monotonic() < deadline, taken
    assert not os.path.exists(first) and os.path.exists(last)
    assert visitor.error("answer_question", [{"path": first, **META}, *OPTIONS]) == NO_PICTURE
    example = next(
        c["props"]["value"] for c in visitor.config["components"] if c["type"] == "image" and c["props"]["value"]
    )
    assert visitor.ask(example)
    assert visitor.ask({"path": visitor.uploaded(picture, "first.png"), **META})
