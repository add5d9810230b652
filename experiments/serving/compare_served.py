"""Compares what vLLM answers with what `generate` did: `python -m experiments.serving.compare_served FOLDER REPORT [NAMES]`.

Runs in vLLM's environment, see `.ci/vllm`, on the answers of [`record_answers`]. Tokens, latents that were fed and log-probs are
compared; equal tokens alone would hide lost latents. Exits with 1 where one differs. With names of `RUNS`, the others stay in the
report as they are.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model's state is read here

import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from vreflection_hub_card import checkpoint_folder  # noqa: E402


# Of log-probs, and of latents by their length. States that are fed back carry rounding on from step to step.
TOLERANCE = 5e-3
# Where the two likeliest tokens are closer than this, rounding may choose.
TIE = 1e-3
BROKEN = "\ufffd"
COMMON = {
    "dtype": "float32",
    "max_model_len": 224,
    "block_size": 32,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "logprobs_mode": "processed_logprobs",
    "kv_cache_memory_bytes": 64 << 20,
    # Else vLLM's cache of encoded pictures would have room for one of the largest size.
    "mm_processor_kwargs": {"max_pixels": 168 * 168},
    # Prompts are computed in parts; room for two encoded pictures, and in the pool, by the longest prompt, for six of eight.
    "max_num_batched_tokens": 96,
}
# Room for the keys and values of three requests, so that they are preempted.
CROWDED = {"num_gpu_blocks_override": 11}
# By name: the answers of `generate`, further options, and how often all is asked; the second time prefixes are cached.
RUNS = {
    "dac, chunked prefill, prefix caching": ("tiny_dac", {}, 2),
    "dac, preemption": ("tiny_dac", CROWDED, 1),
    "dac, asynchronous scheduling, preemption": ("tiny_dac", CROWDED, 1),
    "dac, LoRA": ("adapter_dac", {"enable_lora": True, "max_lora_rank": 8}, 1),
    "hidden, preemption": ("tiny_hidden", CROWDED, 1),
    "Qwen3-VL, dac, preemption": ("qwen3_vl_dac", CROWDED, 1),
    "Qwen3-VL, hidden, chunked prefill, prefix caching": ("qwen3_vl_hidden", {}, 2),
}
# By name: options of a server that is asked over HTTP.
SERVER_RUNS = {"server over HTTP": [], "server over HTTP, tensor parallelism": ["--tensor-parallel-size", "2"]}


def conversation(pictures: list[Image.Image], question: str) -> list[dict]:
    """One question about pictures, as `LLM.chat` takes it."""
    content = [{"type": "image_pil", "image_pil": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def schedule_ahead() -> None:
    """Makes configurations schedule asynchronously: on a GPU vLLM does by default, on a CPU it ignores the option."""
    create = EngineArgs.create_engine_config

    def created(*args, **given):
        config = create(*args, **given)
        config.scheduler_config.async_scheduling = True
        return config

    EngineArgs.create_engine_config = created


def compare(name: str, folder: Path) -> dict:
    """One server: its answers, several requests at a time, beside those of `generate`."""
    records, options, passes = RUNS[name]
    recorded = json.loads((folder / records / "cases.json").read_text())
    cases, latents = recorded["cases"], load_file(folder / records / "latents.safetensors")
    own = folder / records.rsplit("_", 1)[0] / "checkpoint"
    if "asynchronous" in name:
        schedule_ahead()
    llm = LLM(
        str(own if own.exists() else checkpoint_folder()),
        override_generation_config={"latent_feedback": recorded["feedback"]},
        **COMMON | options,
    )
    core = llm.llm_engine.engine_core.engine_core
    state = core.model_executor.driver_worker.worker.model_runner.model_state
    state.departed.limit = 10_000  # to read what was fed
    seen = Counter()
    take = state.departed.take

    def counted_take(request_id):
        request = take(request_id)
        if request is not None:
            seen["preempted"] += 1
            seen["preempted within a reflection"] += request.left > 0
        return request

    state.departed.take = counted_take
    adapter = LoRARequest("adapter", 1, str(folder / "adapter")) if "enable_lora" in options else None
    start_id = state.token_ids[0]
    pictures = [Image.open(file).convert("RGB") for file in sorted((folder / records).glob("*.png"))]
    conversations = [conversation([pictures[index] for index in case["pictures"]], case["question"]) for case in cases]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=recorded["most_tokens"],
            logprobs=0,
            extra_args=case["options"],
            logit_bias={start_id: case["bias"]} if case["bias"] else None,
        )
        for case in cases
    ]
    failures, worst = [], Counter()
    for _ in range(passes):
        outputs = llm.chat(conversations, sampling, lora_request=adapter, use_tqdm=False)
        for number, (case, output) in enumerate(zip(cases, outputs)):
            answer = output.outputs[0]
            tokens = list(answer.token_ids)
            seen["answers"] += 1
            seen["tokens"] += len(tokens)
            seen["reflections"] += case["reflections"]
            seen["answers with a cached prefix"] += bool(output.num_cached_tokens)
            left = {**state.departed.kept, **{request.id: request for request in state.requests.values()}}
            request = next((kept for key, kept in left.items() if key.split("-")[0] == output.request_id), None)
            fed = [] if request is None else [request.latents[position] for position in sorted(request.latents)]
            equal = [ours == theirs for ours, theirs in zip(tokens, case["tokens"])]
            same = equal.index(False) if False in equal else min(len(tokens), len(case["tokens"]))
            if tokens != case["tokens"]:
                if same < len(case["margins"]) and case["margins"][same] < TIE:
                    seen["answers that part at a tie"] += 1
                else:
                    failures.append(f"{number}: tokens {tokens}, generate's {case['tokens']}")
            if tokens == case["tokens"]:
                logprobs = torch.tensor([step[token].logprob for step, token in zip(answer.logprobs, tokens)])
                apart = float((logprobs - torch.tensor(case["logprobs"])).abs().max())
                worst["log-prob"] = max(worst["log-prob"], apart)
                theirs = latents[str(number)]
                if len(fed) != len(theirs):
                    failures.append(f"{number}: {len(fed)} latents, generate's {len(theirs)}")
                elif fed:
                    distance = (torch.stack(fed) - theirs).norm(dim=1) / theirs.norm(dim=1)
                    worst["latent"] = max(worst["latent"], float(distance.max()))
                    seen["latents"] += len(fed)
                if apart > TOLERANCE:
                    failures.append(f"{number}: log-probs are {apart:.2e} apart")
                # vLLM holds the pieces of an unfinished character back.
                if answer.text.rstrip(BROKEN) != case["text"].rstrip(BROKEN):
                    failures.append(f"{number}: text {answer.text!r}, generate's {case['text']!r}")
        state.departed.kept.clear()
    if worst["latent"] > TOLERANCE:
        failures.append(f"latents are {worst['latent']:.2e} apart")
    if "asynchronous" in name and not core.batch_queue_size > 1:
        failures.append("no step was scheduled before the last one's tokens were known")
    if "preemption" in name and not seen["preempted within a reflection"]:
        failures.append("no request was preempted within a reflection")
    if passes > 1 and not seen["answers with a cached prefix"]:
        failures.append("no prefix was cached")
    if state.pool is not None:
        seen["pictures encoded again"] = state.encoded_again
        if passes > 1 and not state.encoded_again:
            failures.append("no picture was encoded again")
    return {
        "counts": dict(seen),
        "largest difference": {"log-prob": worst["log-prob"], "latent, relative": worst["latent"]},
        "failures": failures,
    }


def write_report(report: Path, folder: Path, results: dict) -> None:
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    recorded = json.loads((folder / "tiny_dac" / "cases.json").read_text())["versions"]
    fields = {
        "date": str(date.today()),
        "vllm": versions,
        "generate": recorded,
        "tolerance": TOLERANCE,
        "runs": results,
    }
    report.write_text(json.dumps(fields, indent=2) + "\n")


def main(folder: Path, report: Path | None = None, *names: str) -> None:
    results = json.loads(report.read_text())["runs"] if names and report and report.exists() else {}
    # A process each: vLLM leaves much behind.
    if report is None:
        (name,) = names
        print("RESULT " + json.dumps(compare(name, folder)))
        return
    for name in names or (*RUNS, *SERVER_RUNS):
        command = [sys.executable, "-m", "experiments.serving.compare_served", str(folder), "-", name]
        if name in SERVER_RUNS:
            command = [sys.executable, "-m", "experiments.serving.check_server", str(folder), *SERVER_RUNS[name]]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        error = done.stderr.splitlines()[-3:] or ["no result"]
        results[name] = json.loads(lines[0].removeprefix("RESULT ")) if lines else {"failures": error}
        print(f"{name}: {results[name]}", flush=True)
        write_report(report, folder, results)
    failed = [name for name, result in results.items() if result["failures"]]
    sys.exit(f"differs: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    folder, report, *names = sys.argv[1:]
    main(Path(folder), None if report == "-" else Path(report), *names)
