"""How long an answer takes: `python -m experiments.chains.answer_time path=FILE sft=FILE names=FILE --output TIMES.json`.

Each FILE holds an arm's trained weights, as `train` writes them. The arms take turns on the same questions, one answer at a
time, by `generate`; times are given as ratios to the first arm's, since machines are noisy.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from hub_card.glyphsearch import chain_questions, make_scene, scene_seed
from hub_card.inference.encoding import encode_prompts, user_turn
from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from .arms import ARMS
from .network import EMBEDDED, starting_model
from .train import versions


HOPS = (0, 1, 2, 3)
# An answer that doesn't end is cut.
MAX_NEW_TOKENS = 40


def load_arm(name: str, weights: Path) -> VReflectionForConditionalGeneration:
    """A trained arm, ready to decode as it was trained."""
    arm = ARMS[name]
    model = starting_model(0, arm.patch_positions, torch.device("cpu")).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(weights).items()}, strict=False)
    model.generation_config.latent_feedback = "dac" if arm.decodings[0] == "dac" else "hidden"
    return model


def measure(models: dict, processor: VReflectionProcessor, questions: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each answer by arm and hops; the first round warms up and doesn't count."""
    seconds = {name: {str(hops): [] for hops in HOPS} for name in models}
    for number in tqdm(range(questions + 1), unit="scene"):
        scene = make_scene(scene_seed("validation", number), "chains")
        for hops in HOPS:
            text = chain_questions(scene, "kinship", hops, longest=max(HOPS))[0].text
            inputs = encode_prompts(processor, user_turn([scene.image], text), "cpu")
            for name, model in models.items():
                begun = time.perf_counter()
                model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                if number:
                    seconds[name][str(hops)].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """By arm and hops the median and the quartiles of an answer's time over that of the first arm's answer to the same."""
    first = next(iter(seconds.values()))
    return {
        name: {
            hops: [round(value, 3) for value in (median(pairs), *quantiles(pairs, n=4)[::2])]
            for hops, times in by_hops.items()
            for pairs in [[time / other for time, other in zip(times, first[hops])]]
        }
        for name, by_hops in seconds.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="+", metavar="ARM=FILE")
    parser.add_argument("--questions", type=int, default=40, help="scenes, with a question of each length")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    models = {name: load_arm(name, Path(path)) for name, path in (arm.split("=", 1) for arm in options.arms)}
    seconds = measure(models, VReflectionProcessor.from_pretrained(EMBEDDED), options.questions)
    result = {
        "questions_of_each_length": options.questions,
        "threads": torch.get_num_threads(),
        "made_with": versions(torch.device("cpu")),
        "median_seconds": {
            name: {hops: round(median(times), 4) for hops, times in by_hops.items()}
            for name, by_hops in seconds.items()
        },
        "ratio_to_the_first": ratios(seconds),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
