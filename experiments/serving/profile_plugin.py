"""The processor's time that the plugin adds to vLLM's steps: `python -m experiments.serving.profile_plugin REPORT`.

Runs in vLLM's environment, see `.ci/vllm`. The embedded checkpoint answers eight requests at a time with `dac`, all with a reflection or
all without. Times are of one thread, so that other programs' count little. On a CPU a step is mostly Triton's interpreter, so
that the plugin's share of it says little; its time without DAC's work on tensors is that of Python, on a GPU too.
"""

import functools
import json
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vreflection_hub_card import checkpoint_folder
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions
from vreflection_hub_card.glyphsearch import draw_chain
from vreflection_hub_card.serving.forced_tokens import ServedReflectionForcing
from vreflection_hub_card.serving.reflection_state import ReflectionModelState

from .compare_served import COMMON, conversation


AT_A_TIME, BATCHES = 8, 8
VLLM = "vLLM"
# Methods that override vLLM's and call them; DAC's work on tensors.
OVERRIDES = ("prepare_inputs_embeds", "execute_mm_encoder", "add_request", "remove_request")
DAC = ("_look", "_keep_pictures")


class Clock:
    """Time of this thread in ns by part of the program; what a part calls of another is the other's."""

    def __init__(self):
        self.times, self.calls, self.running = Counter(), Counter(), [VLLM]
        self.since = time.thread_time_ns()

    def switch(self) -> None:
        now = time.thread_time_ns()
        self.times[self.running[-1]] += now - self.since
        self.since = now

    def watch(self, owner, name: str, part: str) -> None:
        """Counts the time of a method as that of a part."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args, **given):
            self.calls[part] += 1
            self.switch()
            self.running.append(part)
            try:
                return method(*args, **given)
            finally:
                self.switch()
                self.running.pop()

        setattr(owner, name, timed)


def profile() -> dict:
    clock, steps = Clock(), {"prompts": [], "latents": [], "words": []}
    for name in OVERRIDES:
        clock.watch(DefaultModelState, name, VLLM)
    for name in (*OVERRIDES, *DAC, "forced_tokens"):
        clock.watch(ReflectionModelState, name, name)
    clock.watch(ServedReflectionForcing, "apply", "apply")
    room = {"max_num_batched_tokens": 2048, "additional_config": {"picture_pool_patches": 4096}}  # no prompt in parts
    llm = LLM(str(checkpoint_folder()), **COMMON | room)
    step = llm.llm_engine.step

    def timed_step():
        clock.switch()
        clock.times.clear()
        clock.calls.clear()
        outputs = step()
        clock.switch()
        if clock.calls["prepare_inputs_embeds"]:
            kind = "prompts" if clock.calls["add_request"] else "latents" if clock.calls["_look"] else "words"
            steps[kind].append((clock.times.copy(), clock.calls["_look"]))
        return outputs

    llm.llm_engine.step = timed_step
    for batch in range(BATCHES + 2):
        if batch == 2:  # those before warmed up
            for kind in steps.values():
                kind.clear()
        scenes = [draw_chain("test", batch * AT_A_TIME + number) for number in range(AT_A_TIME)]
        conversations = [conversation([scene.image], question.text) for scene, question in scenes]
        asked = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"reflect": batch % 2})
        llm.chat(conversations, asked, use_tqdm=False)
    return {kind: summary(seen) for kind, seen in steps.items()}


def summary(seen: list[tuple[Counter, int]]) -> dict:
    """Means over steps."""
    total = sum((times for times, _ in seen), Counter())
    parts = {part: round(time / len(seen) / 1e3, 1) for part, time in total.items() if part != VLLM}
    return {
        "steps": len(seen),
        "latents in a step": round(sum(looks for _, looks in seen) / len(seen), 2),
        "step, ms": round(total.total() / len(seen) / 1e6, 2),
        "plugin, µs": round(sum(parts.values()), 1),
        "DAC, µs": round(sum(parts.get(part, 0.0) for part in DAC), 1),
        "share of the step": round(1 - total[VLLM] / total.total(), 5),
        "parts, µs": parts,
    }


def main(report: Path) -> None:
    result = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "versions": {"vllm": vllm.__version__} | describe_versions(),
        "requests at a time": AT_A_TIME,
        "steps with": profile(),
    }
    report.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
