"""Smoke test of a checkpoint in a clean process: load it by `trust_remote_code`, generate one answer with a reflection.

The process runs this file, without the package that it lies in, on a folder or Hub id and a revision or nothing. The last line
on its stdout is JSON: `{"text": …}`, or `{"error": …}`.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


# What the process must not import.
OURS = ("modeling_vreflection", "vreflection_hub_card", "vreflection_training")
# Where a library would find a cache, a token, or an order not to use the network.
PERSONAL = (
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_MODULES_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "TRANSFORMERS_OFFLINE",
)
TIME_LIMIT = 900  # seconds; requests have shorter time-outs of their own
ANSWER_LENGTH = 8


def smoke_test(
    model: str | Path,
    revision: str | None = None,
    token: str | None = None,
    sha256s: dict[str, str] | None = None,
    seconds: float = TIME_LIMIT,
) -> str:
    """Loads a checkpoint by `trust_remote_code` alone and makes it reflect, in a new process with an empty cache.

    `model` is a folder, which is tried without a network, or a Hub id. What is downloaded must have the hashes `sha256s`.
    Returns the answer, or raises an `InputError`.
    """
    from ..errors import InputError
    from ..evaluation.provenance import sha256

    local = isinstance(model, Path)
    with TemporaryDirectory(prefix="vreflection-") as empty:
        env = {name: value for name, value in os.environ.items() if name not in PERSONAL}
        env |= {"HF_HOME": empty, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if local:
            env["HF_HUB_OFFLINE"] = "1"
        if token is not None:
            env["HF_TOKEN"] = token
        # -I: neither the current folder nor what a person added to Python's path.
        command = [sys.executable, "-I", __file__, str(model.resolve() if local else model), revision or ""]
        try:
            ran = subprocess.run(
                command, cwd=empty, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{model}: loading it and one answer took more than {seconds:.0f} s") from None
        try:
            result = json.loads(ran.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            lines = ran.stderr.strip().splitlines()
            reason = f": {lines[-1]}" if lines else ""
            raise InputError(f"the process that loads {model} ended with {ran.returncode}{reason}") from None
        if "error" in result:
            raise InputError(f"{model}: it can't be used by trust_remote_code alone ({result['error']})")
        for snapshot in Path(empty).glob("hub/models--*/snapshots/*"):
            for name, expected in (sha256s or {}).items():
                if (snapshot / name).is_file() and sha256(snapshot / name) != expected:
                    raise InputError(f"{model}: the Hub sends another {name} than the one that was checked")
    return result["text"]


def load_and_ask(model_id: str, revision: str) -> str:
    """What the clean process does; returns the answer."""
    for name in OURS:
        sys.modules[name] = None  # Python then says that there is no such module
    runpy.run_path(str(Path(__file__).with_name("timeouts.py")))["set_timeouts"]()

    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, logging

    logging.disable_progress_bar()
    how = {"trust_remote_code": True, "revision": revision or None}
    processor = AutoProcessor.from_pretrained(model_id, **how)
    model, report = AutoModelForImageTextToText.from_pretrained(
        model_id, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **how
    )
    wrong = {name for name, *_ in report["mismatched_keys"]} | {*report["missing_keys"], *report["unexpected_keys"]}
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing, unknown or of another shape, {min(wrong)} first")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    picture = Image.linear_gradient("L").resize((112, 112)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    steps = getattr(model.generation_config, "latent_steps", None)
    steps = model.config.num_latent_tokens if steps is None else steps
    # A plain backbone, with no latent steps, can't reflect.
    forced = {"reflect": True} if steps else {}
    sequences = model.generate(**inputs, max_new_tokens=steps + 2 + ANSWER_LENGTH, do_sample=False, **forced)
    new = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    start, slot, end = model.config.latent_token_ids
    if steps and new[: steps + 2] != [start, *[slot] * steps, end]:
        raise ValueError(f"a reflection was asked for, and the answer begins with the tokens {new[: steps + 2]}")
    return processor.decode(new, skip_special_tokens=True)


if __name__ == "__main__":
    try:
        result = {"text": load_and_ask(*sys.argv[1:])}
    except Exception as error:  # whatever it is: it goes to whoever publishes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__}
    print("\n" + json.dumps(result))
