"""A backbone so small that whole benchmarks run in seconds, and scenes of the chains."""

from dataclasses import dataclass, replace

import pytest
import torch

from experiments.benchmark.backbones import BACKBONES
from experiments.benchmark.decoding import random_subject
from experiments.chains.arms import Arm
from experiments.chains.network import EMBEDDED, starting_model
from experiments.chains.rows import Example, Scenes, Tokens, draw_scenes, training_scene
from experiments.chains.train import GRID, Run, parse_arguments
from hub_card.glyphsearch import Question, Scene
from modeling_vreflection import VReflectionProcessor


SMALL = BACKBONES["small"]
TINY = replace(
    SMALL,
    note="a tiny one",
    text=SMALL.text
    | {
        "vocab_size": 1031,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    vision=SMALL.vision
    | {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    },
    side=4,
    mix_divisor=32,
)


@pytest.fixture(scope="session")
def tiny_backbone():
    return TINY


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return random_subject("tiny", TINY, torch.device("cpu"), 0, tmp_path_factory.mktemp("backbone"))


CPU = torch.device("cpu")
# Training scenes 0 and 8 ask for attributes and relations, those between for chains.
SCENES = 9
QUESTIONS = 4  # of each, for runs


@dataclass
class ChainScenes:
    """Training scenes as the experiment keeps them, and the questions that its examples were made of."""

    processor: VReflectionProcessor
    tokens: Tokens
    scenes: dict[float, Scenes]
    examples: list[list[Example]]
    drawn: list[tuple[Scene, list[Question]]]

    def prompt(self, scene: int, question: Question) -> dict:
        """The processor's inputs for a question about a scene."""
        content = [{"type": "image", "image": self.drawn[scene][0].image}, {"type": "text", "text": question.text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def row(self, scene: int, question: Question, answer: list[dict]) -> dict:
        """A row for the package's own training."""
        asked = [{"type": "image"}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"id": f"{scene} {question.text}", "images": [self.drawn[scene][0].image], "messages": messages}


@pytest.fixture(scope="session")
def chains():
    """A few training scenes of the chains."""
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    model = starting_model(0, "none", CPU)
    tokens = Tokens(processor, model.config, GRID)
    scenes, examples = draw_scenes(training_scene, SCENES, model, processor, tokens, {0.0, 0.3})
    return ChainScenes(processor, tokens, scenes, examples, [training_scene(index) for index in range(SCENES)])


@pytest.fixture
def make_run(chains, tmp_path):
    """Makes a run of an arm on the drawn scenes, with further options of the command."""

    def make(arm: Arm, steps: int, name: str = "an_arm", seed: int = 0, **options) -> Run:
        defaults = {"batch": 1, "learning_rate": 1e-3, "scenes": len(chains.examples), "device": "cpu"}
        options = {**defaults, "steps": steps, **options}
        options |= {"output": tmp_path / "results", "checkpoints": tmp_path / "checkpoints"}
        arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        groups = [group[:QUESTIONS] for group in chains.examples]
        shares = {phase.reflecting_rows for phase in arm.phases}
        rows = {share: chains.tokens.rows(groups, arm, CPU, share, seed) for share in shares}
        return Run(name, arm, seed, parse_arguments(arguments), chains.scenes, chains.tokens, rows)

    return make


@pytest.fixture(scope="session")
def starting():
    """The model that arms start from, with `patch_positions`. Tests must leave it as they found it."""
    return starting_model(0, "sincos", CPU)
