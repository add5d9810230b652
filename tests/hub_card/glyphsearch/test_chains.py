"""GlyphSearch's chains: one right answer each, found by code of the tests' own, and nothing to guess it from."""

import hashlib
import random
from collections import Counter, defaultdict
from itertools import permutations

import pytest

from vreflection_hub_card.glyphsearch import (
    CHAIN_KINDS,
    DIFFICULTIES,
    GLYPHS,
    Difficulty,
    chain_questions,
    choose_questions,
    draw_chain,
    draw_question,
    get_difficulty,
    glyphsearch_dataset,
    make_scene,
    scene_row,
    scene_seed,
)


CHAINS = {"chains": {"kinship": 3, "spatial": 2}, "longer_chains": {"kinship": 4, "spatial": 3}}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
SCENES = 1500
# Hashes of scenes and questions, drawn by the version before chains.
BEFORE = {
    "easy": "ea10f8961e13eee82155d59c2c7da0f90546395e5a0f2dd6522c497959da4bde",
    "default": "c9c6cbcfdaff29c5a89eff9fc5642fc30a4c262343c11800e216b7a5860e5249",
    "mixed": "9199fe6edeb6d7d9bada9e977364b74951a8102b32fe6c9c4d6319efd0d66f73",
    "study": "e34ffa9c3ac3d537edf16636492237053562508f773430db88ca7b429bfb8710",
    "hard": "6549f0ccb7fd8d8a0c587c674436a0c8f303a3c498b55cf966c849bddfce1788",
}


def follow(scene, text):
    """The shapes that a question leads over, read from its words alone; every step must lead to exactly one."""
    assert text.startswith("Which glyph is on ") and text.endswith("?")
    *hops, start = text.removeprefix("Which glyph is on ").removesuffix("?").split("the shape ")
    *hops, start = [part.strip() for part in [*hops, start] if part]
    words, _, start = start.rpartition("the ")
    hops += [words.strip()] if words else []
    (here,) = [item for item in scene.objects if item.name == start]
    path = [here]
    for hop in reversed(hops):
        if hop in SIDES:
            down, right = SIDES[hop]
            (row, column), size = here.cell, scene.difficulty.grid
            line = [(row + far * down, column + far * right) for far in range(1, size)]
            level = [(far, item) for far, cell in enumerate(line, 1) for item in scene.objects if item.cell == cell]
            ((distance, there),) = level
            assert distance == 1
        elif hop == "of the same colour as":
            (there,) = [item for item in scene.objects if item is not here and item.colour == here.colour]
        else:
            assert hop == "of the same form as"
            (there,) = [item for item in scene.objects if item is not here and item.shape == here.shape]
        path.append(there)
        here = there
    return path


@pytest.fixture(scope="module")
def drawn():
    """By difficulty, scenes with one question each, as rows have it."""
    return {
        difficulty: [draw_question("train", index, difficulty) for index in range(SCENES)] for difficulty in CHAINS
    }


@pytest.mark.parametrize("difficulty, kind", [(name, kind) for name in CHAINS for kind in CHAIN_KINDS])
def test_a_question_has_one_right_answer_and_never_leads_back(drawn, difficulty, kind):
    for scene, _ in drawn[difficulty][:200]:
        for hops in range(CHAINS[difficulty][kind] + 1):
            asked = chain_questions(scene, kind, hops)
            assert asked and len({question.text for question in asked}) == len(asked)
            for question in asked:
                path = follow(scene, question.text)
                assert list(question.path) == path
                assert (question.kind, question.hops, len(path)) == (kind, hops, hops + 1)
                assert question.answer == path[-1].glyph
                assert len(set(path)) == len(path)  # so no shape leads to itself, and none is met again


def test_every_chain_is_found(drawn):
    """Compared with all ways of going from shape to shape, each step by the definition."""

    def joined(scene, kind, here, there):
        """How many words lead from a shape to another."""
        others = [item for item in scene.objects if item is not here]
        if kind == "kinship":
            alike = [
                [item for item in others if getattr(item, part) == getattr(here, part)] for part in ("colour", "shape")
            ]
            return sum(found == [there] for found in alike)
        (row, column), (other_row, other_column) = here.cell, there.cell
        if abs(row - other_row) + abs(column - other_column) != 1:
            return 0
        beyond = (
            2 * other_row - row,
            2 * other_column - column,
        )  # in a grid of three, the only other cell on that side
        return int(all(item.cell != beyond for item in others))

    for scene, _ in drawn["chains"][:20]:
        for kind, hops in (("kinship", 1), ("kinship", 2), ("spatial", 1), ("spatial", 2)):
            expected = Counter()
            for path in permutations(scene.objects, hops + 1):
                ways = 1
                for here, there in zip(path, path[1:]):
                    ways *= joined(scene, kind, here, there)
                expected[path] = ways
            assert Counter(question.path for question in chain_questions(scene, kind, hops)) == +expected


def test_lengths_are_those_of_the_difficulty(drawn):
    for difficulty, pairs in drawn.items():
        assert DIFFICULTIES[difficulty].chains == CHAINS[difficulty]
        lengths = [(kind, hops) for kind, longest in CHAINS[difficulty].items() for hops in range(longest + 1)]
        counts = Counter((question.kind, question.hops) for _, question in pairs)
        assert set(counts) == set(lengths)
        assert all(abs(count / SCENES - 1 / len(lengths)) < 0.04 for count in counts.values())
    assert not any(question.hops == 4 for _, question in drawn["chains"])
    assert any(question.hops == 4 for _, question in drawn["longer_chains"])


def test_questions_of_all_lengths_ask_for_the_same_shapes(drawn):
    for difficulty, pairs in drawn.items():
        for scene, _ in pairs[:300]:
            for kind, longest in CHAINS[difficulty].items():
                asked_for = [
                    {question.target for question in chain_questions(scene, kind, hops, longest)}
                    for hops in range(longest + 1)
                ]
                assert asked_for[0] and all(shapes == asked_for[0] for shapes in asked_for)


def chi_squared(table):
    """The statistic of independence of a table of counts by row and column, and its degrees of freedom."""
    rows, columns = list(table), sorted({column for counts in table.values() for column in counts})
    total = sum(sum(counts.values()) for counts in table.values())
    in_column = {column: sum(table[row][column] for row in rows) for column in columns}
    statistic = 0.0
    for row in rows:
        in_row = sum(table[row].values())
        for column in columns:
            expected = in_row * in_column[column] / total
            statistic += (table[row][column] - expected) ** 2 / expected
    return statistic, (len(rows) - 1) * (len(columns) - 1)


def exceeds(statistic, freedom):
    """Whether a chi-squared statistic is above its 99.9 % quantile, by Wilson and Hilferty's approximation."""
    return statistic > freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("difficulty, kind", [(name, kind) for name in CHAINS for kind in CHAIN_KINDS])
@pytest.mark.parametrize("what", ["cell", "glyph"])
def test_the_place_and_the_glyph_of_the_answer_are_independent_of_the_length(drawn, difficulty, kind, what):
    table = defaultdict(Counter)
    for _, question in drawn[difficulty]:
        if question.kind == kind:
            table[question.hops][getattr(question.target, what)] += 1
    assert not exceeds(*chi_squared(table))


def test_an_answer_that_could_be_told_from_the_length_would_be_noticed(drawn):
    """Without the same targets for all lengths, the centre is asked for more often without a hop than after two."""
    table, rng = defaultdict(Counter), random.Random(0)
    for number, (scene, _) in enumerate(drawn["chains"]):
        question = rng.choice(chain_questions(scene, "spatial", number % 3))
        table[question.hops][question.target.cell] += 1
    assert exceeds(*chi_squared(table))


def best_guess(pairs):
    """How often the commonest outcome of a feature is right on the other half of the pairs."""
    half = len(pairs) // 2
    seen, right = defaultdict(Counter), 0
    for feature, outcome in pairs[:half]:
        seen[feature][outcome] += 1
    for feature, outcome in pairs[half:]:
        right += bool(seen[feature]) and seen[feature].most_common(1)[0][0] == outcome
    return right / (len(pairs) - half)


FEATURES = {
    "length": lambda question: question.hops,
    "kind and length": lambda question: (question.kind, question.hops),
    "last hop": lambda question: question.text.split(" the ")[1],
    "named colour": lambda question: question.path[0].colour,
    "named form": lambda question: question.path[0].shape,
    "named shape": lambda question: question.path[0].name,
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("difficulty", CHAINS)
def test_without_the_picture_the_glyph_is_a_guess(drawn, difficulty, name):
    pairs = [(FEATURES[name](question), question.answer) for _, question in drawn[difficulty]]
    assert len(GLYPHS) == 10
    assert best_guess(pairs) < 0.1 + 3.5 * (0.1 * 0.9 / (SCENES / 2)) ** 0.5


@pytest.mark.parametrize("difficulty, kind", [(name, kind) for name in CHAINS for kind in CHAIN_KINDS])
def test_the_length_tells_nothing_of_the_place(drawn, difficulty, kind):
    places = [(question.hops, question.target.cell) for _, question in drawn[difficulty] if question.kind == kind]
    blind = best_guess([(None, cell) for _, cell in places])
    assert best_guess(places) < blind + 3.5 * (2 * blind * (1 - blind) / (len(places) / 2)) ** 0.5


def test_a_scene_of_chains_is_a_pure_function_of_its_seed():
    for index in range(10):
        seed = scene_seed("test", index)
        first = make_scene(seed, "chains")
        random.random()  # another state of the global generator
        again = make_scene(seed, get_difficulty("chains"))
        assert first.objects == again.objects and first.image.tobytes() == again.image.tobytes()
        assert len({item.glyph for item in first.objects}) == len(first.objects)
        asked = [choose_questions(scene, 7, random.Random(seed)) for scene in (first, again)]
        assert asked[0] == asked[1] and len({question.text for question in asked[0]}) == 7
        assert draw_question("test", index, "chains")[1] == draw_question("test", index, "chains")[1]


def test_all_questions_are_drawn_where_more_are_wanted():
    scene = make_scene(5, "chains")
    every = {
        question.text
        for kind, longest in CHAINS["chains"].items()
        for hops in range(longest + 1)
        for question in chain_questions(scene, kind, hops, longest)
    }
    asked = choose_questions(scene, 10_000, random.Random(0))
    assert len(asked) == len(every) and {question.text for question in asked} == every


def test_rows_of_chains_have_paths_and_the_papers_one_box():
    lengths = set()
    for index, (row, plain) in enumerate(
        zip(glyphsearch_dataset("test", 30, "chains"), glyphsearch_dataset("test", 30, "chains", paths=False))
    ):
        _, question = draw_question("test", index, "chains")
        boxes = [list(item.box) for item in question.path]
        reflection, answer = row["messages"][1]["content"]
        where = {"box": boxes[0]} if len(boxes) == 1 else {"boxes": boxes}
        assert reflection == {"type": "reflection", **where, "image_index": 0}
        assert plain["messages"][1]["content"] == [
            {"type": "reflection", "box": boxes[-1], "image_index": 0}, answer
        ]  # fmt: skip
        lengths.add(len(boxes))
    assert lengths == {1, 2, 3, 4}


def test_a_relation_is_a_path_of_two():
    for index in range(40):
        _, question = draw_question("train", index, "hard")
        reflection = scene_row(index, "train", DIFFICULTIES["hard"])["messages"][1]["content"][0]
        if question.kind == "relation":
            anchor, target = follow(draw_question("train", index, "hard")[0], question.text)
            assert reflection["boxes"] == [list(anchor.box), list(target.box)]
        else:
            assert reflection["box"] == list(question.target.box)


@pytest.mark.parametrize("difficulty", ["easy", "default", "mixed", "study", "hard"])
def test_scenes_and_questions_from_before_chains_are_as_they_were(difficulty):
    digest = hashlib.sha256()
    for index in range(20):
        scene, question = draw_question("test", index, difficulty)
        digest.update(scene.image.tobytes())
        digest.update(repr([(item.name, item.glyph, item.pixel_box) for item in scene.objects]).encode())
        digest.update(repr((question.text, question.answer, question.target.pixel_box)).encode())
    assert digest.hexdigest() == BEFORE[difficulty]


def test_chains_that_no_scene_can_hold_are_refused():
    # With nine shapes on nine cells only the middle one of a side has one neighbour on that side.
    with pytest.raises(ValueError, match="'spatial': 3"):
        make_scene(0, Difficulty(min_objects=9, max_objects=9, distinct_colours=False, chains={"spatial": 3}))


def test_a_drawn_chain_has_two_hops_of_either_kind_and_is_the_same_each_time():
    drawn = [draw_chain("test", index) for index in range(40)]
    assert {question.kind for _, question in drawn} == {"kinship", "spatial"}
    for index, (scene, question) in enumerate(drawn):
        assert question.hops == 2 and question.path == tuple(follow(scene, question.text))
        assert scene.image.tobytes() == make_scene(scene_seed("test", index), "chains").image.tobytes()
    assert [question for _, question in drawn] == [draw_chain("test", index)[1] for index in range(40)]
