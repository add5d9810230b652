"""`transformers serve` as docs/serving.md starts it, over HTTP: latents are on, nobody gets another's, and no request runs code."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, GenerationConfig
from transformers.cli.serve import Serve

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.evaluation.asking_server import scene_rows
from vreflection_hub_card.evaluation.interventions import first_latents
from vreflection_hub_card.glyphsearch import draw_question, make_scene, scene_seed
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint
from vreflection_hub_card.inference.encoding import answer_texts, encode_prompts
from vreflection_training.cli import main


openai = pytest.importorskip("openai", reason='needs pip install "transformers[serving]" openai')
pytest.importorskip("fastapi", reason='needs pip install "transformers[serving]"')

SEEDS = range(300, 308)
NEW_TOKENS = 40
LATENT_TOKENS = 10  # start, eight slots, end
ROOT = Path(__file__).parents[2]
MODEL = str(EMBEDDED)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of the server that docs/serving.md starts, in a process of its own: pinned to `MODEL`."""
    log = tmp_path_factory.mktemp("serve") / "log"
    port = free_port()
    code = re.search(r'^python -c "(.*Serve.*)"$', (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)[1]
    code = code.replace("Serve(str(folder('vreflection_tiny'))", f"Serve(str(folder('vreflection_tiny')), port={port}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent / "hf")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=log.parent, env=environment, stdout=output, stderr=output
        )
    try:
        wait_until_healthy(port, lambda: process.poll() is None, log.read_text)
        started = client_of(port)
        started.log = log
        yield started
    finally:
        process.kill()
        process.wait(30)


@contextmanager
def serving(model=None):
    """A client of a server in this process, started with `--trust-remote-code`; without `model` the open form."""
    port = free_port()
    server = Serve(model, trust_remote_code=True, port=port, log_level="error", non_blocking=True)
    try:
        wait_until_healthy(port)
        yield client_of(port)
    finally:
        server.kill_server()


@pytest.fixture(scope="module")
def open_client():
    """A client of the open form, which loads whatever folder a request names."""
    with serving() as client:
        yield client


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client_of(port):
    return openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)


def wait_until_healthy(port, runs=lambda: True, log=str):
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert runs() and time.monotonic() < deadline, log()
            time.sleep(0.1)


def ask(client, folder, seed, **options):
    """One question about one picture, in OpenAI's format; the picture is sent as PNG, bit for bit."""
    scene, asked = draw_question("test", seed)
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": asked.text}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=str(folder), messages=messages, **options)


def said(completion):
    return completion.choices[0].message.content


@pytest.fixture(scope="module")
def generate():
    """What the checkpoint says when it is asked here, one question at a time."""
    loaded = {}

    def run(folder, seed, **options):
        if folder not in loaded:
            model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
            loaded[folder] = model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model, processor = loaded[folder]
        inputs = inputs_of(processor, [seed])
        new = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True), len(new)

    return run


def inputs_of(processor, seeds):
    drawn = [draw_question("test", seed) for seed in seeds]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": asked.text}]}]
        for scene, asked in drawn
    ]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversations, **template, processor_kwargs={"padding": True})


def test_the_embedded_checkpoint_answers_with_latents(client, generate):
    for seed in SEEDS:
        completion = ask(client, MODEL, seed, max_tokens=NEW_TOKENS)
        text, count = generate(EMBEDDED, seed)
        assert said(completion) == text == draw_question("test", seed)[1].answer
        assert completion.usage.completion_tokens == count > LATENT_TOKENS
        assert completion.choices[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", ["default", "chains"])
def test_evaluate_gets_the_answers_of_generate(client, tmp_path, monkeypatch, difficulty):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    arguments = ["--server", str(client.base_url), "--difficulty", difficulty, "--limit", "16", "--batch-size", "4"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path)]) == 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    model, processor = load_checkpoint(EMBEDDED, "cpu")
    rows, _ = scene_rows("test", difficulty, 16)
    inputs = encode_prompts(processor, [row.conversation() for row in rows], "cpu")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    assert [sample["text"] for sample in samples] == answer_texts(processor, tokens)
    assert all(sample["tokens"] > LATENT_TOKENS and sample["finish_reason"] == "stop" for sample in samples)
    assert (tmp_path / "results.json").read_text().count(str(EMBEDDED.parent)) == 0


@pytest.mark.slow
def test_the_documented_example_runs(client, tmp_path):
    code = re.search(r"```python\n(import base64.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)[1]
    make_scene(scene_seed("test", 0)).image.save(tmp_path / "scene.png")
    code = code.replace("http://localhost:8000/v1", str(client.base_url))
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"[A-Z]\n", ran.stdout), ran.stderr


def test_an_answer_streams_without_the_latents(client):
    chunks = list(ask(client, MODEL, 300, stream=True, max_tokens=NEW_TOKENS))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == draw_question("test", 300)[1].answer
    # Streamed or not, latents count.
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage]
    assert usage == ask(client, MODEL, 300, max_tokens=NEW_TOKENS).usage


def test_without_latents_it_answers_something_else(open_client, generate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "latents"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_steps": 0}))
    for seed in SEEDS[:3]:
        completion = ask(open_client, folder, seed, max_tokens=NEW_TOKENS)
        text, count = generate(EMBEDDED, seed, latent_steps=0)
        assert said(completion) == text != said(ask(open_client, EMBEDDED, seed, max_tokens=NEW_TOKENS))
        assert completion.usage.completion_tokens == count < LATENT_TOKENS


def test_a_request_sets_its_own_latent_steps(client, generate):
    config = {"latent_steps": 3, "max_new_tokens": NEW_TOKENS, "eos_token_id": [379, 380]}
    completion = ask(client, MODEL, 300, extra_body={"generation_config": json.dumps(config)})
    assert completion.usage.completion_tokens == generate(EMBEDDED, 300, latent_steps=3)[1] == 3 + 2 + 2


@pytest.fixture(scope="module")
def depending_folder(tiny_folder, ids, tmp_path_factory):
    """A checkpoint whose every answer is another one with other latents, and always begins with a reflection."""
    folder = tmp_path_factory.mktemp("depending") / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    start = ids[0]
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config = GenerationConfig.from_pretrained(folder)
    config.begin_suppress_tokens = [token for token in range(vocabulary) if token != start]
    config.latent_steps = 8
    config.save_pretrained(folder)
    return folder


def test_eight_at_once_keep_their_latents(open_client, generate, depending_folder):
    folder = depending_folder
    alone = [generate(folder, seed, do_sample=False)[0] for seed in SEEDS]
    # With another's latents every one of these answers would be another one.
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = inputs_of(processor, SEEDS)
    model = VReflectionForConditionalGeneration.from_pretrained(folder).eval()
    result = model.generate(**inputs, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    latents = first_latents(result.latents, result.sequences[:, inputs["input_ids"].shape[1] :], model.config)
    others = torch.stack([latents[row] for row in range(len(SEEDS))]).roll(1, 0)
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, latents=others)
    mixed = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert not set(mixed) & set(alone)

    ask(open_client, folder, SEEDS[0], max_tokens=NEW_TOKENS)
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        together = list(pool.map(lambda seed: said(ask(open_client, folder, seed, max_tokens=NEW_TOKENS)), SEEDS))
    assert together == alone


def test_eight_at_once_are_answered_like_one(client, generate):
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        answers = list(pool.map(lambda seed: said(ask(client, MODEL, seed, max_tokens=NEW_TOKENS)), SEEDS))
    assert answers == [draw_question("test", seed)[1].answer for seed in SEEDS]
    assert len(set(answers)) > 4


def write_intruder(folder):
    """Makes a checkpoint's folder whose code, if anybody runs it, writes a file `ran` into it."""
    (folder / "custom_generate").mkdir(parents=True)
    for file in ("code.py", "custom_generate/generate.py"):
        (folder / file).write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    classes = {name: "code.Class" for name in ("AutoConfig", "AutoModel", "AutoModelForMultimodalLM", "AutoProcessor")}
    config = {"model_type": "intruder", "architectures": ["Class"], "auto_map": classes}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (folder / file).write_text(json.dumps(config))
    return folder


def post(client, path, body, content_type="application/json"):
    """Sends a raw request; returns the status and the text of the answer."""
    url = str(client.base_url).removesuffix("/v1/") + path
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def load(client, folder):
    return post(client, "/load_model", {"model": str(folder)})


def transcribe(client, folder):
    fields = f"""--X\r\nContent-Disposition: form-data; name="model"\r\n\r\n{folder}\r
--X\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--X--\r\n"""
    return post(client, "/v1/audio/transcriptions", fields.encode(), "multipart/form-data; boundary=X")


CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
PROMPTS = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "Hello"}, "/v1/responses": {"input": "Hello"}}


@pytest.mark.parametrize("path", PROMPTS)
def test_the_pinned_form_refuses_another_model(client, tmp_path, path):
    intruder = write_intruder(tmp_path / "intruder")
    status, answer = post(client, path, {"model": str(intruder), **PROMPTS[path]})
    assert status == 400 and f"pinned to '{MODEL}'" in answer
    assert not (intruder / "ran").exists()


def test_the_pinned_form_runs_no_code(client, tmp_path):
    intruder = write_intruder(tmp_path / "intruder")
    assert '"status": "error"' in load(client, intruder)[1]
    assert transcribe(client, intruder)[0] == 500
    code = {"custom_generate": str(intruder), "trust_remote_code": True}
    for fields, expected in (
        ({"generation_config": json.dumps(code)}, 200),
        ({"chat_template_kwargs": code}, 500),  # the processor knows no such arguments
        # What a template reads would be in the prompt: it must fail.
        ({"chat_template_kwargs": {"chat_template": "{{ ''.__class__.__mro__ }}"}}, 500),
        ({"chat_template_kwargs": {"chat_template": f"{{% include '{intruder}/config.json' %}}"}}, 500),
        ({"adapter": str(intruder)}, 422),
    ):
        assert post(client, "/v1/chat/completions", CHAT | fields)[0] == expected, fields
    assert not (intruder / "ran").exists()


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies a checkpoint's code before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_open_form_runs_code(open_client, modules_cache, tmp_path):
    intruder = write_intruder(tmp_path / "intruder")
    post(open_client, "/v1/chat/completions", {"model": str(intruder), **CHAT})
    assert (intruder / "ran").exists()


def test_a_pin_alone_stops_no_code(modules_cache, tmp_path):
    with serving(str(EMBEDDED)) as client:
        for send in (load, transcribe):
            intruder = write_intruder(tmp_path / send.__name__)
            send(client, intruder)
            assert (intruder / "ran").exists()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_video_is_refused_and_not_fetched(client, path):
    part = {"type": "video_url", "video_url": {"url": "http://localhost:9/clip.mp4"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which glyph?"}]}]
    name = "input" if path.endswith("responses") else "messages"
    before = len(client.log.read_text())
    assert post(client, path, {"model": MODEL, name: messages}) == (500, "Internal Server Error")
    deadline = time.monotonic() + 30
    while "ValueError: " not in (log := client.log.read_text()[before:]):  # written after the answer
        assert time.monotonic() < deadline, log
        time.sleep(0.05)
    reason = next(line for line in log.splitlines() if line.startswith("ValueError: "))
    assert "Message 0 (user) holds a part of type 'video', and V-Reflection looks at pictures" in reason
    assert "localhost:9" not in log


def test_a_request_may_name_a_picture_by_its_path(client, tmp_path):
    """What docs/serving.md warns of: transformers has no option against it."""
    scene, asked = draw_question("test", 300)
    scene.image.save(tmp_path / "scene.png")
    content = [
        {"type": "image_url", "image_url": {"url": str(tmp_path / "scene.png")}},
        {"type": "text", "text": asked.text},
    ]
    messages = [{"role": "user", "content": content}]
    assert said(client.chat.completions.create(model=MODEL, messages=messages)) == asked.answer
