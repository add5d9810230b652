"""What a step of decoding asks of the device, counted on a CPU: `python -m experiments.benchmark.operators`.

Operators of torch that a step runs, and graphs that compiled decoding records. A GPU launches about one kernel an operator,
views left out, and waits for the host in between: what ours runs beyond the stock class's is what ours costs there.
"""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BatchFeature, CompileConfig

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn

from ..markdown_tables import markdown
from .decoding import DEFAULT, DecodingArm, Variant


RESULT = Path(__file__).parent / "results" / "operators.json"
TEXT_STEPS = 8
# Of the prompts that are answered one after the other; a picture of another size has another number of tokens.
SIDES = (168, 168, 112, 140)
ARMS = {
    "stock": ("the stock class", "stock", "hidden"),
    "hidden": ("ours, `hidden`", "ours", "hidden"),
    "dac": ("ours, `dac`", "ours", "dac"),
}


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run within it, in `number`, without those that only view what is there."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in operator._schema.returns)
        self.number += not views
        return operator(*args, **(kwargs or {}))


class Traced(Variant):
    """Steps compiled by a backend that records the graphs and runs them as they are."""

    @property
    def options(self) -> dict:
        options = CompileConfig(backend="eager", mode=None, fullgraph=True)
        options._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": options}


def count_operators(arm: DecodingArm, prompt: BatchFeature) -> dict[str, float]:
    """Operators of a text step and of a latent step, of the stock class's text step in its place: means over the steps."""
    with OperatorCount() as count:
        arm.clock = lambda: count.number
        answer = arm.answer(prompt, TEXT_STEPS)
    return {name: answer[name] for name in ("text_step", "latent_step")}


def count_graphs(arm: DecodingArm, prompts: list[BatchFeature]) -> list[int]:
    """Graphs that are recorded by the end of each of these answers."""
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt in prompts:
        arm.answer(prompt, TEXT_STEPS)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return graphs


def count_steps() -> dict:
    """The counts of both classes with the embedded checkpoint, batch 1, and the versions that they were counted with."""
    model = VReflectionForConditionalGeneration.from_pretrained(EMBEDDED)
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    prompts = []
    for index, side in enumerate(SIDES):
        scene, question = draw_question("test", index)
        prompts.append(
            encode_prompts(processor, [user_turn([scene.image.resize((side, side))], question.text)], "cpu")
        )
    arms = {}
    for name, (title, model_class, feedback) in ARMS.items():
        make_arm = partial(DecodingArm, model.state_dict(), model.config, model_class, latent_feedback=feedback)
        steps = count_operators(make_arm(DEFAULT), prompts[0])
        graphs = count_graphs(make_arm(Traced("sdpa", "static", compiled=True)), prompts)
        arms[name] = {"title": title, **steps, "graphs": graphs}
    return {
        "command": "python -m experiments.benchmark.operators",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "layers": model.config.text_config.num_hidden_layers,
        "prompt_tokens": [prompt["input_ids"].shape[1] for prompt in prompts],
        "arms": arms,
    }


def operators_table(result: dict) -> str:
    """The counts as a Markdown table."""
    rows = [
        [arm["title"], f"{arm['text_step']:g}", f"{arm['latent_step']:g}", ", ".join(map(str, arm["graphs"]))]
        for arm in result["arms"].values()
    ]
    header = "batch 1 | operators of a text step | of a latent step (stock: the text step in its place) | graphs after each answer"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{markdown(header, rows)}\n\nOperators without views; means over the steps. Graphs: compiled steps, a static cache, "
        f"prompts of {', '.join(map(str, result['prompt_tokens']))} tokens. The embedded checkpoint, with {result['layers']} layers. "
        f"Counted by `{result['command']}` on {result['date'][:10]}; {versions}."
    )


if __name__ == "__main__":
    RESULT.write_text(json.dumps(count_steps(), indent=1) + "\n")
