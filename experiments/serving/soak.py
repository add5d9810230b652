"""Keeps a crowded server busy for long: `python -m experiments.serving.soak FOLDER REPORT [--minutes 30]`.

Runs in vLLM's environment on the answers of [`record_answers`], see `.ci/vllm`. Clients ask, stream, leave in the middle and send what
is refused, while requests are preempted and pictures leave the pool. Exits with 1 where a whole answer is not the recorded one, where
memory grows, or where one of these things didn't happen.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import openai
import psutil
import torch
import vllm
from prometheus_client.parser import text_string_to_metric_families

from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions

from .check_server import Client, differences, refused_requests, serving


CLIENTS = 16
# Keys and values of three requests; the pool of pictures is as small as the longest prompt allows.
CROWDED = ("--num-gpu-blocks-override", "11")
LEAVE, REFUSED = 0.2, 0.1  # shares of the requests; of the others every whole answer is compared
ATTEMPTS = 10
SECONDS_BETWEEN = 20
MOST_GROWTH = 0.05
# By name in the result, counters of the server.
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "prompt tokens found in the cache": "vllm:prefix_cache_hits_total",
}
HAPPENED = ("answers", "streamed", "left", "refused", "preemptions", "prompt tokens found in the cache")


def one_request(client: Client, draw: random.Random, counts: Counter) -> list[str]:
    """Asks, reads or leaves; returns what was wrong."""
    kind, streamed, case = draw.random(), draw.random() < 0.5, draw.choice(client.cases)
    if kind < REFUSED:
        request, expected = draw.choice(refused_requests(client))
        try:
            request()
            said = "answered"
        except openai.BadRequestError as error:
            said = error.message
        counts["refused"] += 1
        return [] if expected in said else [f"{expected}: {said}"]
    leaves = kind < REFUSED + LEAVE
    try:
        limit = {"timeout": draw.uniform(0.5, 5)} if leaves and not streamed else {}
        answer = client.ask_case(case, streamed, **limit)
    except openai.APITimeoutError:
        if not leaves:
            raise
        counts["left"] += 1
        return []
    if leaves and streamed:
        for _ in zip(range(draw.randint(1, 6)), answer):
            pass
        answer.close()
        counts["left"] += 1
        return []
    found = differences(case, answer)
    counts["answers"] += 1
    counts["streamed"] += streamed
    counts["mixed answers"] += bool(found)
    return found


def keep_asking(client: Client, number: int, until: float) -> tuple[Counter, list[str]]:
    """One client, until the time is up or it found three things wrong."""
    draw, counts, failures = random.Random(number), Counter(), []
    attempt = 0
    while time.monotonic() < until and len(failures) < 3:
        try:
            failures += one_request(client, draw, counts)
            attempt = 0
        except openai.InternalServerError as error:
            # As docs/serving.md says: after a refused request, or one that left, the next one with its picture may fail.
            counts["retried"] += 1
            attempt += 1
            if attempt == ATTEMPTS:
                failures.append(f"{ATTEMPTS} times in a row: {error.message}")
        except openai.APIError as error:
            failures.append(repr(error))
    return counts, failures


def watch_memory(server: psutil.Process, ended: threading.Event) -> dict[str, list[float]]:
    """Resident memory in MiB of the server and of vLLM's processes behind it, every 20 seconds."""
    titles = {child: child.cmdline()[0] for child in server.children(recursive=True)}
    watched = {"server": server} | {title: child for child, title in titles.items() if title.startswith("VLLM::")}
    seen = {name: [] for name in watched}
    while not ended.wait(SECONDS_BETWEEN):
        for name, process in watched.items():
            seen[name].append(process.memory_info().rss / 2**20)
    return seen


def growth(seen: list[float]) -> dict[str, float]:
    """The medians of the second sixth and of the last, and by how much memory grew between them."""
    sixth = max(1, len(seen) // 6)
    early, late = statistics.median(seen[sixth : 2 * sixth]), statistics.median(seen[-sixth:])
    return {
        "second sixth, MiB": round(early, 1),
        "last sixth, MiB": round(late, 1),
        "growth": round(late / early - 1, 4),
    }


def read_metrics(client: Client) -> Counter:
    """The server's own figures, summed over their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{client.port}/metrics") as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    figures = Counter()
    for sample in (sample for family in families for sample in family.samples):
        figures[sample.name] += sample.value
    return figures


def soak(folder: Path, log: Path, minutes: float) -> dict:
    ended = threading.Event()
    with serving(folder / "tiny_dac", log, *CROWDED) as (client, server), ThreadPoolExecutor(CLIENTS + 1) as pool:
        watching = pool.submit(watch_memory, psutil.Process(server.pid), ended)
        until = time.monotonic() + 60 * minutes
        try:
            done = list(pool.map(lambda number: keep_asking(client, number, until), range(CLIENTS)))
        finally:
            ended.set()
        time.sleep(5)
        figures = read_metrics(client)
        memory = {name: growth(seen) for name, seen in watching.result().items()}
    counts = sum((counts for counts, _ in done), Counter())
    counts.update({name: int(figures[metric]) for name, metric in COUNTERS.items()})
    failures = [found for _, found in done for found in found]
    failures += [f"no {name}" for name in HAPPENED if not counts[name]]
    if figures["vllm:num_requests_running"] or figures["vllm:num_requests_waiting"]:
        failures.append("requests of clients that left are still computed")
    failures += [f"memory of the {name} grew: {seen}" for name, seen in memory.items() if seen["growth"] > MOST_GROWTH]
    return {"counts": {"mixed answers": 0} | dict(counts), "memory": memory, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    result = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "versions": {"vllm": vllm.__version__} | describe_versions(),
        "minutes": options.minutes,
        "clients": CLIENTS,
    }
    result |= soak(options.folder, options.folder / "soak.log", options.minutes)
    options.report.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
