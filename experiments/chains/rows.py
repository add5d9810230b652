"""Scenes and questions as tensors: cached vision features, boxes as patches, and rows of token ids of one length."""

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from hub_card.glyphsearch import (
    DIFFICULTIES,
    Difficulty,
    Question,
    Scene,
    chain_questions,
    choose_questions,
    make_scene,
    questions,
    scene_seed,
)
from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.regions_vreflection import box_patches, quantise_box

from .arms import Arm


RELATION_SCENES = Difficulty(relation_share=0.5)
# One training scene in so many asks for attributes and relations, the others for chains.
RELATION_SCENE_EVERY = 8
QUESTIONS = 7  # of a training scene; of chains, one of each kind and length
MAX_SHAPES = 9
IGNORED = -100
PICTURES_AT_ONCE = 256
LENGTHS = 80  # training lines are padded to a multiple: a GPU's code is compiled for each length

Drawn = tuple[Scene, list[Question]]


@dataclass(frozen=True)
class Example:
    """A question as token ids, and the right answer in every form; `path` holds places among the scene's shapes."""

    scene: int
    kind: str
    hops: int
    path: tuple[int, ...]
    prompt: list[int]
    answers: dict[str, list[int]]
    glyph: int  # token id


@dataclass
class Scenes:
    """What is kept of drawn scenes: features (scenes, L, D), and the patches of each shape, (scenes, 9, L), bool."""

    features: torch.Tensor
    patches: torch.Tensor
    grid: tuple[int, int]


@dataclass
class Rows:
    """Rows of one arm on one device. R rows about one scene share a line, and in it the prompt's beginning with the picture.

    Args:
        ids (`torch.LongTensor` of shape `(N, T)`): The shared beginning, then each row's question and answer; padded.
        labels (`torch.LongTensor` of shape `(N, T)`): The answers' tokens but for slots and their end; else -100.
        place (`torch.LongTensor` of shape `(N, T)`): Every token's place in its own row.
        row (`torch.LongTensor` of shape `(N, T)`): Which of the R rows a token belongs to, -1 for the shared ones.
        scene (`torch.LongTensor` of shape `(N,)`): Number of the scene.
        path (`torch.LongTensor` of shape `(N, R * S)`): For each step the place of its shape in the scene.
        slot (`torch.LongTensor` of shape `(N, R)`): Column of the first slot, or 1 where the row has none.
        reflects (`torch.BoolTensor` of shape `(N, R)`): Whether the row has slots.
        answer (`torch.LongTensor` of shape `(N, R)`): Column of the answer's first token.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    place: torch.Tensor
    row: torch.Tensor
    scene: torch.Tensor
    path: torch.Tensor
    slot: torch.Tensor
    reflects: torch.Tensor
    answer: torch.Tensor


def training_scene(index: int) -> Drawn:
    """The training scene of an index, and its questions."""
    seed = scene_seed("train", index)
    scene = make_scene(seed, "chains" if index % RELATION_SCENE_EVERY else RELATION_SCENES)
    asked = choose_questions(scene, QUESTIONS, random.Random(f"questions {seed}"))
    return scene, (asked * QUESTIONS)[:QUESTIONS]  # a scene of few shapes allows fewer: they are asked twice


def test_scene(index: int) -> Drawn:
    """A scene that no training sees, and its questions: in turn of chains, of attributes and relations, and of longer chains."""
    seed = scene_seed("test", index)
    rng = random.Random(f"questions {seed}")
    difficulty = ("chains", RELATION_SCENES, "longer_chains")[index % 3]
    scene = make_scene(seed, difficulty)
    if difficulty == "chains":
        return scene, choose_questions(scene, QUESTIONS, rng)
    if difficulty == "longer_chains":
        longest = DIFFICULTIES[difficulty].chains
        return scene, [rng.choice(chain_questions(scene, kind, hops)) for kind, hops in longest.items()]
    asked = questions(scene)
    return scene, [rng.choice([one for one in asked if one.kind == kind]) for kind in ("attribute", "relation")]


class Tokens:
    """Prompts and answers as token ids, as the processor's template makes them."""

    def __init__(self, processor: VReflectionProcessor, config, grid: tuple[int, int]):
        self.tokenizer, self.config, self.grid = processor.tokenizer, config, grid
        self.encoded = {}
        content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = processor.image_token * (grid[0] * grid[1])
        self.head, self.tail = (
            self.encode(part) for part in text.replace(processor.image_token, image).split("QUESTION")
        )
        self.image_start = self.head.index(config.image_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer(text).input_ids
        return self.encoded[text]

    def examples(self, number: int, drawn: Drawn) -> list[Example]:
        """A scene's questions; `number` is the scene's."""
        scene, asked = drawn
        places = {item.cell: place for place, item in enumerate(scene.objects)}
        return [
            Example(
                scene=number,
                kind=question.kind,
                hops=question.hops,
                path=tuple(places[item.cell] for item in question.path),
                prompt=self.head + self.encode(question.text) + self.tail,
                answers=self.answers(question),
                glyph=self.encode(question.answer)[0],
            )
            for question in asked
        ]

    def answers(self, question: Question) -> dict[str, list[int]]:
        """The right answer by form, each with the end of the turn."""
        config, end = self.config, [self.tokenizer.eos_token_id]
        glyph = self.encode(question.answer) + end
        begin, slot, close = config.latent_token_ids
        names = "".join(f"the {item.name}\n{item.glyph}\n" for item in question.path[:-1])
        boxes = ""
        for item in question.path:
            patches = box_patches(quantise_box(item.box), self.grid)
            rows, columns = patches // self.grid[1], patches % self.grid[1]
            boxes += "".join(str(int(edge)) for edge in (columns[0], rows[0], columns[-1], rows[-1])) + "\n"
        return {
            "glyph": glyph,
            "slots glyph": [begin, *[slot] * config.num_latent_tokens, close, *glyph],
            "boundaries glyph": [begin, close, *glyph],
            "names": self.encode(f"{names}the {question.target.name}\n{question.answer}") + end,
            "boxes": self.encode(boxes + question.answer) + end,
        }

    def positions(self, length: int) -> torch.Tensor:
        """Positions (3, length) of a row's tokens: the picture stands at the same place in every row."""
        height, width = self.grid
        before = torch.arange(self.image_start).expand(3, -1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        image = self.image_start + torch.stack([torch.zeros_like(y), y, x]).flatten(1)
        after = (
            self.image_start + max(self.grid) + torch.arange(length - self.image_start - height * width).expand(3, -1)
        )
        return torch.cat([before, image, after], 1)

    def rows(
        self,
        groups: list[list[Example]],
        arm: Arm,
        device: torch.device,
        reflecting_rows: float = 1.0,
        seed: int = 0,
    ) -> Rows:
        """The arm's rows of these examples, grouped by scene, as many in each; `seed` draws the share that reflects."""
        rng = random.Random(seed)
        steps, shared = self.config.num_latent_tokens, len(self.head)
        columns = {name: [] for name in ("scene", "path", "slot", "reflects", "answer")}
        lines = {"ids": [], "supervised": [], "place": [], "row": []}
        for group in groups:
            ids, supervised = [*self.head], [0] * shared
            place, row = [*range(shared)], [-1] * shared
            path, slot, reflects, answers = [], [], [], []
            for number, example in enumerate(group):
                form = arm.answer if rng.random() < reflecting_rows else "glyph"
                question, answer = example.prompt[shared:], example.answers[form]
                answers.append(len(ids) + len(question))
                reflects.append(form == "slots glyph")
                slot.append(answers[-1] + 1 if reflects[-1] else 1)
                looked_at = example.path if arm.whole_path else example.path[-1:]
                path += [looked_at[min(step, len(looked_at) - 1)] for step in range(steps)]
                length = len(question) + len(answer)
                ids += question + answer
                supervised += [0] * len(question) + [1] * len(answer)
                place += range(shared, shared + length)
                row += [number] * length
            for name, values in zip(lines, (ids, supervised, place, row)):
                lines[name].append(values)
            for name, values in zip(columns, (group[0].scene, path, slot, reflects, answers)):
                columns[name].append(values)
        fillers = {"ids": self.tokenizer.pad_token_id, "supervised": 0, "place": 0, "row": -2}
        multiple = LENGTHS if len(groups[0]) > 1 else 1
        tensors = {name: pad(lines[name], filler, multiple) for name, filler in fillers.items()}
        forced = (self.config.latent_token_id, self.config.latent_end_token_id)
        supervised = tensors.pop("supervised").bool() & ~torch.isin(tensors["ids"], torch.tensor(forced))
        tensors["labels"] = tensors["ids"].where(supervised, IGNORED)
        tensors |= {name: torch.tensor(values) for name, values in columns.items()}
        return Rows(**{name: values.to(device) for name, values in tensors.items()})


def pad(lines: list[list[int]], filler: int, multiple: int) -> torch.Tensor:
    """Lines of different lengths as one tensor (N, T), with T a multiple."""
    lengths = np.array([len(line) for line in lines])
    longest = -(-lengths.max() // multiple) * multiple
    padded = np.full((len(lines), longest), filler)
    padded[np.arange(longest) < lengths[:, None]] = np.fromiter(chain.from_iterable(lines), np.int64, lengths.sum())
    return torch.from_numpy(padded)


def draw_scenes(
    draw: Callable[[int], Drawn],
    count: int,
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    tokens: Tokens,
    jitters: set[float] = frozenset({0.0}),
) -> tuple[dict[float, Scenes], list[list[Example]]]:
    """Draws scenes with several processes; returns what is kept of them, once for each jitter of the boxes, and the examples."""
    features, examples, patches = [], [], []
    with ProcessPoolExecutor() as pool, tqdm(total=count, desc="scenes", unit="scene") as progress:
        numbers = [range(first, min(first + PICTURES_AT_ONCE, count)) for first in range(0, count, PICTURES_AT_ONCE)]
        for images, some, their_patches in pool.map(partial(_draw, draw, tokens, sorted(jitters)), numbers):
            images = list(torch.from_numpy(images).to(model.device))
            pixels = processor.image_processor(images=images, return_tensors="pt", device=model.device).to(
                model.device
            )
            with torch.no_grad():
                pictures = model.model.image_features(pixels["pixel_values"], pixels["image_grid_thw"])
            features.append(torch.stack(pictures))
            examples += some
            patches.append(their_patches)
            progress.update(len(images))
    features, patches = torch.cat(features), torch.from_numpy(np.concatenate(patches)).to(model.device)
    return {
        jitter: Scenes(features, patches[:, place], tokens.grid) for place, jitter in enumerate(sorted(jitters))
    }, examples


def _draw(
    draw: Callable[[int], Drawn], tokens: Tokens, jitters: list[float], numbers: range
) -> tuple[np.ndarray, list[list[Example]], np.ndarray]:
    """Pictures (scenes, 3, height, width), uint8; examples by scene; patches (scenes, jitters, 9, L), bool."""
    torch.set_num_threads(1)
    images, examples, patches = [], [], []
    for number in numbers:
        drawn = draw(number)
        images.append(np.asarray(drawn[0].image).transpose(2, 0, 1))
        examples.append(tokens.examples(number, drawn))
        boxes = [item.box for item in drawn[0].objects]
        patches.append([patches_of(boxes, tokens.grid, jitter, random.Random(number)) for jitter in jitters])
    return np.stack(images), examples, np.array(patches)


def patches_of(boxes: list[tuple], grid: tuple[int, int], jitter: float, rng: random.Random) -> np.ndarray:
    """The patches that each box overlaps, (9, L), bool, with its sides moved by up to `jitter` of the box's own."""
    patches = np.zeros((MAX_SHAPES, grid[0] * grid[1]), dtype=bool)
    for place, (x0, y0, x1, y1) in enumerate(boxes):
        if jitter:
            width, height = x1 - x0, y1 - y0
            left, right, top, bottom = (rng.uniform(-jitter, jitter) for _ in range(4))
            x0, x1 = max(0, x0 + left * width), min(1, x1 + right * width)
            y0, y1 = max(0, y0 + top * height), min(1, y1 + bottom * height)
        patches[place, box_patches(quantise_box((x0, y0, x1, y1)), grid).numpy()] = True
    return patches
