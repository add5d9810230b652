"""`vreflection evaluate --server`: what is sent, what is kept, and what goes wrong, with a server that answers by table."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import PIL.Image
import pytest

from modeling_vreflection.pictures_vreflection import open_picture
from vreflection_hub_card.evaluation import chat_server
from vreflection_hub_card.evaluation.chat_server import base_url, find_key
from vreflection_hub_card.glyphsearch import draw_question
from vreflection_training.cli import main


KEY = "sk-very-secret"


class Handler(BaseHTTPRequestHandler):
    """Answers `GET /v1/models` and `POST /v1/chat/completions` as its `server` says."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(*self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers.items()), body))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        answer = self.server.respond(body)
        with self.server.lock:  # before the client can send the next
            self.server.at_once -= 1
        self.reply(*answer)

    def reply(self, status, body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def completion(text, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 12, "prompt_tokens": 3, "total_tokens": 15}}


def text_of(body):
    """The last question of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@pytest.fixture(scope="module")
def running():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock = threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    """A server that lists one model and repeats the question's last word."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(chat_server, "PAUSES", (0.01, 0.01))
    running.requests, running.at_once, running.most_at_once = [], 0, 0
    running.models = 200, {"data": [{"id": "served"}]}
    running.respond = lambda body: completion(text_of(body).split()[-1])
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    return running


@pytest.fixture
def rows(tmp_path):
    """Five questions, one in a longer conversation, about two pictures."""
    PIL.Image.effect_noise((40, 30), 90).convert("RGBA").save(tmp_path / "see_through.png")
    PIL.Image.radial_gradient("L").resize((50, 60)).convert("RGB").save(tmp_path / "photo.jpg", quality=60)
    lines = [
        {"question": f"Say {word}", "answer": word, "image": picture}
        for word, picture in (("one", "see_through.png"), ("two", "photo.jpg"), ("three", "photo.jpg"))
    ]
    lines.append({"question": "Say four", "answer": "five"})
    parts = [{"type": "text", "text": "Fi"}, {"type": "text", "text": "rst"}]
    turns = [
        ("system", "Be brief."),
        ("user", "Say x"),
        ("assistant", parts),
        ("user", "Say six"),
        ("assistant", "six"),
    ]
    lines.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def evaluate(server, tmp_path):
    """Runs the command on the server; returns the exit code and the folder."""

    def run(*arguments):
        return main(["evaluate", "--server", server.url, "--output", str(tmp_path / "out"), *map(str, arguments)])

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_sent(server, evaluate, rows, tmp_path):
    assert evaluate("--rows", rows, "--batch-size", "1", "--latent-steps", "4", "--no-reflect") == 0
    bodies = [body for _, _, body in server.requests]
    path, headers, first = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    picture, text = first["messages"][0]["content"]
    assert text == {"type": "text", "text": "Say one"} and first["messages"][0]["role"] == "user"
    for body, name in zip(bodies, ("see_through.png", "photo.jpg")):
        kind, _, encoded = body["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
        sent = PIL.Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert kind == "data:image/png" and sent.mode == "RGB"
        assert sent.tobytes() == open_picture(tmp_path / name).tobytes()
    # Turns without pictures are plain strings, which every server takes.
    assert bodies[3]["messages"] == [{"role": "user", "content": "Say four"}]
    assert [turn["content"] for turn in bodies[4]["messages"]] == ["Be brief.", "Say x", "First", "Say six"]
    for body in bodies:
        del body["messages"]
        assert body.pop("stream", False) is False
        xargs = {"latent_steps": 4, "reflect": 0}
        assert body == {"model": "served", "max_tokens": 512, "temperature": 0, "vllm_xargs": xargs}


def test_nothing_of_ours_is_sent_unless_asked_for(server, evaluate, rows, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # which is for Hugging Face's servers
    server.models = 404, {"detail": "Not Found"}  # a name that is given needs no list
    assert evaluate("another", "--rows", rows, "--limit", "1", "--max-new-tokens", "30") == 0
    ((_, headers, body),) = server.requests
    assert "vllm_xargs" not in body and (body["model"], body["max_tokens"]) == ("another", 30)
    assert "authorization" not in headers and "hf_secret" not in str(headers)


def test_answers_are_asked_for_with_a_few_requests_at_a_time(server, evaluate, rows, tmp_path, capsys):
    words = ["one", "two", "three", "four", "six"]

    def later_questions_first(body):
        word = text_of(body).split()[-1]
        deadline = time.monotonic() + 5
        while server.most_at_once < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02 * (len(words) - words.index(word)))
        return completion(f" <think>hm</think>\n{word} ", "length" if word == "two" else "stop")

    server.respond = later_questions_first
    assert evaluate("--rows", rows, "--batch-size", "3") == 0
    assert server.most_at_once == 3
    out = tmp_path / "out"
    samples = read_lines(out / "samples.jsonl")
    assert [(sample["id"], sample["text"]) for sample in samples] == [
        (f"my-{i}", word) for i, word in enumerate(words)
    ]
    assert sorted(answer["index"] for answer in read_lines(out / "answers.rank0.jsonl")[1:]) == [0, 1, 2, 3, 4]
    assert (samples[0]["tokens"], samples[1]["finish_reason"]) == (12, "length")
    assert "rows: 4 of 5 right" in (said := capsys.readouterr().out) and "1 cut at --max-new-tokens" in said
    report = json.loads((out / "results.json").read_text())
    assert report["command"] == (
        f"vreflection evaluate served --server {server.url} --rows my.jsonl --match exact --max-new-tokens 512 --batch-size 3"
    )
    assert report["tasks"]["rows"]["accuracy"]["successes"] == 4
    assert not [path for path in out.iterdir() if KEY in path.read_text()]


def test_an_answer_that_was_cut_within_its_thoughts_is_none(server, evaluate, rows, tmp_path):
    server.respond = lambda body: completion("<think>\nIt may be one.", "length")
    assert evaluate("--rows", rows) == 0
    assert {sample["text"] for sample in read_lines(tmp_path / "out" / "samples.jsonl")} == {""}


def test_a_run_that_failed_goes_on(server, evaluate, rows, tmp_path, capsys):
    usual = server.respond
    server.respond = lambda body: (503, b"busy") if text_of(body) == "Say three" else usual(body)
    assert evaluate("--rows", rows, "--batch-size", "1") == 2
    assert "the server answers with status 503: busy; asked for: row my-2" in capsys.readouterr().err
    server.respond, server.requests[:] = usual, []
    assert evaluate("--rows", rows, "--batch-size", "2") == 0
    again = {text_of(body) for _, _, body in server.requests}
    assert {"Say three"} <= again <= {"Say three", "Say four", "Say six"}  # one more may have been on its way
    assert len(read_lines(tmp_path / "out" / "samples.jsonl")) == 5
    # Another model's answers, or others of this one, don't mix with these.
    assert evaluate("another", "--rows", rows) == 2
    assert "model = 'served', not 'another'; choose another output folder" in capsys.readouterr().err


@pytest.mark.parametrize("failing, others", [(0.5, 0), (0, 0.5)], ids=["late", "early"])
def test_answers_beside_a_failure_are_kept(server, evaluate, rows, tmp_path, failing, others):
    usual = server.respond

    def one_fails(body):
        fails = text_of(body) == "Say one"
        time.sleep(failing if fails else others)
        return (400, b"broken") if fails else usual(body)

    server.respond = one_fails
    assert evaluate("--rows", rows, "--batch-size", "5") == 2
    kept = [answer["index"] for answer in read_lines(tmp_path / "out" / "answers.rank0.jsonl")[1:]]
    assert sorted(kept) == [1, 2, 3, 4]


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_server_is_asked_again(server, evaluate, rows, status):
    usual, said = server.respond, []

    def busy_twice(body):
        said.append(text_of(body))
        return (status, b"busy") if said.count(said[-1]) <= 2 else usual(body)

    server.respond = busy_twice
    assert evaluate("--rows", rows, "--batch-size", "2") == 0
    assert [said.count(f"Say {word}") for word in ("one", "two", "three", "four", "six")] == [3] * 5


def test_an_answer_that_is_all_thoughts_is_cut(server, evaluate, rows, tmp_path, capsys):
    server.respond = lambda body: completion(None, "length")
    assert evaluate("--rows", rows) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["rows"]
    assert (result["cut"], result["unparsed"], result["accuracy"]["successes"]) == (5, 5, 0)


def test_the_scenes_of_glyphsearch(server, evaluate, tmp_path, capsys):
    drawn = [draw_question("validation", index, "chains") for index in range(4)]
    answers = {}
    for scene, question in drawn[:3]:
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        answers[base64.b64encode(file.getvalue()).decode()] = question.answer
    server.respond = lambda body: completion(
        answers.get(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2], "unknown")
    )
    assert evaluate("--difficulty", "chains", "--split", "validation", "--limit", "4") == 0
    assert "glyphsearch_answers: 3 of 4 right" in capsys.readouterr().out
    samples = read_lines(tmp_path / "out" / "samples.jsonl")
    assert samples[0]["id"] == "validation chains 0" and samples[0]["question"] == drawn[0][1].text
    result = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["glyphsearch_answers"]
    kinds = result["accuracy_by_kind"]
    assert kinds.pop("overall") == result["accuracy"] and sum(kind["count"] for kind in kinds.values()) == 4
    assert main(["evaluate", "--compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "answer, fragment",
    [
        ((400, {"error": {"message": "slots in\nthe prompt", "code": 400}}), "answers with status 400: slots in the prompt"),
        ((422, {"detail": [{"msg": "Unexpected keys"}]}), "answers with status 422: [{'msg': 'Unexpected keys'}]"),
        ((502, b"<html>Bad gateway</html>"), "answers with status 502;"),
        ((401, {"error": {"message": f"wrong key {KEY}"}}), "refuses the key in OPENAI_API_KEY (wrong key …)"),
        (completion(None, "stop"), "an answer has no text (finish_reason is 'stop')"),
        ((200, {"choices": []}), "not an answer of OpenAI's API (IndexError"),
        ((200, {}), "not an answer of OpenAI's API (TypeError"),
        ((200, b"hello"), "not an answer of OpenAI's API (JSONDecodeError"),
    ],
)  # fmt: skip
def test_answers_that_are_none(server, evaluate, rows, capsys, answer, fragment):
    server.respond = lambda body: answer
    assert evaluate("--rows", rows) == 2
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert (
        line.startswith(f"vreflection: {server.url}: ") and fragment in line and line.endswith("asked for: row my-0")
    )
    assert KEY not in said.out + said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    "models, fragment",
    [
        ((200, {"data": [{"id": "one"}, {"id": "two"}]}), "offers 2 models (one, two): name the one to ask"),
        ((404, {"detail": "Not Found"}), "lists no models: name the one to ask"),
        ((401, {"error": "who?"}), "refuses the key in OPENAI_API_KEY (who?)"),
        ((200, b"<html>"), "not an answer of OpenAI's API"),
    ],
)
def test_lists_without_the_one_model(server, evaluate, rows, capsys, models, fragment):
    server.models = models
    assert evaluate("--rows", rows) == 2
    assert fragment in capsys.readouterr().err and server.requests == []


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["--replace"], "--replace takes the weights"),
        (["--latent-feedback", "dac"], "--latent-feedback takes the weights"),
        (["--max-pixels", "9"], "--max-pixels takes the weights"),
        (["--tasks", "glyphsearch"], "since it measures latents and looks"),
        (["--tasks", "mmvp"], "--tasks mmvp takes the weights"),
        (["--match", "letter"], "--match is for --rows"),
        (["--latent-steps", "4", "8"], "one number of --latent-steps"),
        (["--latent-steps", "8", "--max-new-tokens", "10"], "no room for an answer"),
        (["--limit", "1"], "can't be reached"),
    ],
)
def test_mistakes(arguments, fragment, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Nobody listens on port 9.
    assert main(["evaluate", "--server", "http://127.0.0.1:9", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert fragment in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_offline_mode_is_named(server, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert evaluate("--limit", "1") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_addresses_and_whose_key_goes_where():
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/chat/completions"):
        assert base_url(url) == "http://a:1/v1"
    for url in ("a:1", "ftp://a", "http://", "http://a:99999", "http://[a", "http://a b"):
        with pytest.raises(ValueError, match="not a server's address.*http://localhost:8000/v1"):
            base_url(url)
    for url in ("http://ann:secret@a", "http://a/v1?key=secret"):
        with pytest.raises(ValueError, match="no user, password or query") as raised:
            base_url(url)
        assert "secret" not in str(raised.value)
    names = {url: find_key(url)[0] for url in (
        "https://x.endpoints.huggingface.cloud/v1", "http://x.huggingface.cloud/v1", "https://nothuggingface.co/v1", "http://localhost/v1"
    )}  # fmt: skip
    assert list(names.values()) == ["HF_TOKEN", *3 * ["OPENAI_API_KEY"]]
