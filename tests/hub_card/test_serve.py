"""`transformers serve` as README starts it, asked over HTTP by OpenAI's client: latents are on, and nobody gets another's."""

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
from pathlib import Path

import pytest
from transformers import AutoModelForMultimodalLM, AutoProcessor, GenerationConfig

from vreflection_hub_card.evaluation.interventions import LatentInterventionModel
from vreflection_hub_card.glyphsearch import draw_question, make_scene, scene_seed
from vreflection_hub_card.inference.checkpoints import EMBEDDED


openai = pytest.importorskip("openai", reason='needs pip install "transformers[serving]" openai')
pytest.importorskip("fastapi", reason='needs pip install "transformers[serving]"')

SEEDS = range(300, 308)
NEW_TOKENS = 40
LATENT_TOKENS = 10  # start, eight slots, end
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of one server, which loads whatever folder a request names."""
    log = tmp_path_factory.mktemp("serve") / "log"
    (log.parent / "hub_card").symlink_to(ROOT / "hub_card")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent / "hf")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=log.parent,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 120
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait(30)


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


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
        completion = ask(client, EMBEDDED, seed, max_tokens=NEW_TOKENS)
        text, count = generate(EMBEDDED, seed)
        assert said(completion) == text == draw_question("test", seed)[1].answer
        assert completion.usage.completion_tokens == count > LATENT_TOKENS
        assert completion.choices[0].finish_reason == "stop"


def test_the_readme_example_runs(client, tmp_path):
    code = re.search(r"```python\n(import base64.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    make_scene(scene_seed("test", 0)).image.save(tmp_path / "scene.png")
    code = code.replace("http://localhost:8000/v1", str(client.base_url))
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"[A-Z]\n", ran.stdout), ran.stderr


def test_an_answer_streams_without_the_latents(client):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, EMBEDDED, 300, stream=True)]
    assert "".join(pieces) == draw_question("test", 300)[1].answer


def test_without_latents_it_answers_something_else(client, generate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "latents"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_steps": 0}))
    for seed in SEEDS[:3]:
        completion = ask(client, folder, seed, max_tokens=NEW_TOKENS)
        text, count = generate(EMBEDDED, seed, latent_steps=0)
        assert said(completion) == text != said(ask(client, EMBEDDED, seed, max_tokens=NEW_TOKENS))
        assert completion.usage.completion_tokens == count < LATENT_TOKENS


def test_a_request_sets_its_own_latent_steps(client, generate):
    config = {"latent_steps": 3, "max_new_tokens": NEW_TOKENS, "eos_token_id": [379, 380]}
    completion = ask(client, EMBEDDED, 300, extra_body={"generation_config": json.dumps(config)})
    assert completion.usage.completion_tokens == generate(EMBEDDED, 300, latent_steps=3)[1] == 3 + 2 + 2


@pytest.fixture(scope="module")
def depending_folder(tiny_folder, ids, tmp_path_factory):
    """A checkpoint whose answers depend on its latents, unlike the embedded one's, and always begin with a reflection."""
    folder = tmp_path_factory.mktemp("depending") / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    start = ids[0]
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config = GenerationConfig.from_pretrained(folder)
    config.begin_suppress_tokens = [token for token in range(vocabulary) if token != start]
    config.latent_steps = 8
    config.save_pretrained(folder)
    return folder


def test_eight_at_once_keep_their_latents(client, generate, depending_folder):
    folder = depending_folder
    alone = [generate(folder, seed, do_sample=False)[0] for seed in SEEDS]
    # With another's latents every one of these answers would be another one.
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = inputs_of(processor, SEEDS)
    model = LatentInterventionModel.from_pretrained(folder).eval()
    with model.recording() as record:
        model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    with model.feeding(record.latents.roll(1, 0)):
        sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    mixed = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert not set(mixed) & set(alone)

    ask(client, folder, SEEDS[0], max_tokens=NEW_TOKENS)
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        together = list(pool.map(lambda seed: said(ask(client, folder, seed, max_tokens=NEW_TOKENS)), SEEDS))
    assert together == alone


def test_eight_at_once_are_answered_like_one(client, generate):
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        answers = list(pool.map(lambda seed: said(ask(client, EMBEDDED, seed, max_tokens=NEW_TOKENS)), SEEDS))
    assert answers == [draw_question("test", seed)[1].answer for seed in SEEDS]
    assert len(set(answers)) > 4
