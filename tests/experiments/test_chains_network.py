"""The chains' network: rows that share a line are rows alone, and its decoding is `generate`'s."""

import pytest
import torch

from experiments.chains.arms import ARMS, TWO_STAGES, Arm
from experiments.chains.decoding import Prompts
from experiments.chains.evaluate import Evaluation
from experiments.chains.network import EMBEDDED, Batch, Network, starting_model
from modeling_vreflection import VReflectionForConditionalGeneration


CPU = torch.device("cpu")


def batch_of(chains, groups, arm: Arm) -> Batch:
    rows = chains.tokens.rows(groups, arm, CPU, arm.phases[0].reflecting_rows)
    return Batch.pick(rows, chains.scenes[0.0], torch.arange(len(groups)))


def losses_and_gradients(network: Network, batch: Batch, phase) -> tuple[dict, dict]:
    network.model.zero_grad()
    terms = network.losses(batch, phase, torch.tensor(1.0))
    terms["loss"].backward()
    gradients = {name: one.grad for name, one in network.model.named_parameters() if one.grad is not None}
    return {name: term.item() for name, term in terms.items()}, gradients


@pytest.mark.parametrize(
    "name, phase",
    [("path", ARMS["path"].phases[0]), ("path_half", ARMS["path"].phases[0]), ("path", TWO_STAGES[0])]
    + [("one_box", TWO_STAGES[1]), ("names", ARMS["names"].phases[0])],
    ids=["path", "half of the rows", "stage 1", "stage 2", "words"],
)
def test_rows_of_a_line_are_rows_alone(chains, name, phase):
    arm = ARMS[name]
    network = Network(starting_model(0, arm.patch_positions, CPU), chains.tokens)
    together = batch_of(chains, chains.examples[:2], arm)
    alone = batch_of(chains, [[example] for group in chains.examples[:2] for example in group], arm)
    assert alone.reflects.flatten().tolist() == together.reflects.flatten().tolist()
    losses, gradients = losses_and_gradients(network, together, phase)
    expected_losses, expected = losses_and_gradients(network, alone, phase)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert gradients.keys() == expected.keys()
    whole = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    for name, gradient in expected.items():  # that of DAC's key bias is nothing but rounding
        assert (gradients[name] - gradient).norm() < 1e-4 * max(gradient.norm(), 1e-3 * whole), name


def test_a_row_sees_no_other_of_its_line(chains, starting):
    network = Network(starting, chains.tokens)
    batch = batch_of(chains, chains.examples[:1], ARMS["path"])
    with torch.no_grad():
        embeds = network.embed(batch)
        states = network.states(batch, embeds)[0]
        second = batch.row[0] == 1
        changed = embeds.clone()
        changed[0, second] += 1.0
        moved = (network.states(batch, changed)[0] != states).any(1)
    assert moved[second].all() and not moved[~second].any()


@pytest.fixture(scope="module", params=["embedded", pytest.param("starting", marks=pytest.mark.slow)])
def network(request, chains, starting):
    """The embedded checkpoint, and the model that arms start from."""
    model = starting
    if request.param == "embedded":
        model = VReflectionForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    return Network(model, chains.tokens)


def first_questions(chains) -> list:
    """Two questions about each of the first three scenes: the scene's number, the question, and its example."""
    scenes = list(zip(chains.drawn, chains.examples))[:3]
    return [
        (number, question, example)
        for number, ((_, questions), examples) in enumerate(scenes)
        for question, example in list(zip(questions, examples))[:2]
    ]


def alone(chains) -> list:
    """The same examples, each a group of its own."""
    return [[example] for *_, example in first_questions(chains)]


def prompts_of(chains, network: Network, arm: Arm) -> Prompts:
    """The same examples' prompts."""
    rows = chains.tokens.rows(alone(chains), arm, CPU)
    return Prompts(network, Batch.pick(rows, chains.scenes[0.0], torch.arange(len(rows.ids))), rows.answer[:, 0])


def generate(chains, network: Network, row: int, **options):
    """What `generate` returns for the question of a row, and the new tokens."""
    scene, question, _ = first_questions(chains)[row]
    inputs = chains.prompt(scene, question)
    options = {"max_new_tokens": 36, "do_sample": False, "return_dict_in_generate": True, **options}
    result = network.model.generate(**inputs, **options)
    return result, result.sequences[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("feedback", ["dac", "hidden"])
def test_roll_out_feeds_what_generate_feeds(chains, network, feedback):
    """Step by step after the same latents: where DAC was never trained, a rounding error grows tenfold a step."""
    latents, looks = prompts_of(chains, network, ARMS["path"]).roll_out(feedback)
    assert (looks is None) == (feedback == "hidden")
    for row in (0, 2, 4):
        for step in range(8):
            given = {"latents": latents[row : row + 1, :step]} if step else {}
            result, _ = generate(
                chains, network, row, reflect=True, latent_feedback=feedback, max_new_tokens=12, **given
            )
            assert result.latents.shape[1] == 8
            torch.testing.assert_close(latents[row, step], result.latents[0, step], rtol=1e-4, atol=1e-4)
            if looks is not None:
                torch.testing.assert_close(looks[row, step], result.latent_attention[0, step], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def evaluation(chains, network):
    return Evaluation(network, chains.tokens, chains.scenes[0.0], alone(chains))


@pytest.fixture(scope="module")
def own(chains, network):
    """For each feedback and row `generate`'s latents and tokens."""
    return {
        feedback: [
            generate(chains, network, row, reflect=True, latent_feedback=feedback) for row in range(len(alone(chains)))
        ]
        for feedback in ("dac", "hidden")
    }


@pytest.mark.parametrize("feedback", ["dac", "hidden"])
def test_answers_are_those_of_generate(chains, network, evaluation, own, feedback):
    """After the same latents: right is the token that `generate` says, where it then ends; another token is wrong."""
    prompts = prompts_of(chains, network, ARMS["path"])
    latents = torch.cat([result.latents for result, _ in own[feedback]])
    said = [tokens[10:] for _, tokens in own[feedback]]
    glyphs = torch.tensor([tokens[0] for tokens in said])
    ended = [tokens[1] == evaluation.end for tokens in said]
    assert any(ended)
    assert evaluation.answer(prompts, latents, glyphs) == ended
    assert not any(evaluation.answer(prompts, latents, glyphs + 1))


def counted(evaluation: Evaluation, values: list) -> dict:
    """Sum and count by kind and hops."""
    found = {}
    for example, value in zip(evaluation.examples, values, strict=True):
        total, count = found.setdefault(example.kind, {}).get(str(example.hops), [0, 0])
        found[example.kind][str(example.hops)] = [total + value, count + 1]
    return found


def is_right(evaluation: Evaluation, row: int, said: list[int]) -> bool:
    """Whether an answer is the glyph and then ends."""
    return said == [evaluation.examples[row].glyph, evaluation.end]


def test_figures_of_a_reflecting_arm_are_those_of_generate(chains, network, evaluation, own):
    rows = chains.tokens.rows(alone(chains), ARMS["path"], CPU)
    figures = evaluation.reflecting(rows, "dac")
    latents, _ = prompts_of(chains, network, ARMS["path"]).roll_out("dac")
    everyone = range(len(latents))
    right = [is_right(evaluation, row, tokens[10:]) for row, (_, tokens) in enumerate(own["dac"])]
    assert figures["accuracy"] == counted(evaluation, right)

    replaced = {
        "zeroed": torch.zeros_like(latents),
        "shuffled": torch.cat([latents[3:], latents[:3]]),
        "first_look": latents[:, [0] * 8],
        "reversed": latents[:, list(range(7, -1, -1))],
    }
    for name, given in replaced.items():
        said = [
            generate(chains, network, row, reflect=True, latent_feedback="dac", latents=given[row : row + 1])[1][10:]
            for row in everyone
        ]
        right = [is_right(evaluation, row, tokens) for row, tokens in enumerate(said)]
        assert figures["replaced"][name] == counted(evaluation, right), name

    begins = [generate(chains, network, row)[1][0] == evaluation.start_id for row in everyone]
    assert figures["begins a reflection"] == sum(begins) / len(begins)

    for step in range(8):
        hits = []
        for (result, _), (_, question, _) in zip(own["dac"], first_questions(chains)):
            x0, y0, x1, y1 = question.path[min(step, question.hops)].pixel_box
            y, x = divmod(int(result.latent_attention[0, step].argmax()), 6)
            hits.append(y0 < 28 * y + 28 and y1 > 28 * y and x0 < 28 * x + 28 and x1 > 28 * x)
        assert figures["inside the box by step"][step] == counted(evaluation, hits), step


@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_a_tolerance_ends_reflections_where_generate_does(chains, network, evaluation, tolerance):
    rows = chains.tokens.rows(alone(chains), ARMS["path"], CPU)
    figures = evaluation.reflecting(rows, "dac")["tolerance"][str(tolerance)]
    counts, right = [], []
    for row in range(len(alone(chains))):
        result, tokens = generate(
            chains, network, row, reflect=True, latent_feedback="dac", latent_tolerance=tolerance
        )
        counts.append(int(result.latent_counts))
        right.append(is_right(evaluation, row, tokens[counts[-1] + 2 :]))
    assert figures == {"accuracy": counted(evaluation, right), "steps": counted(evaluation, counts)}


def test_text_goes_on_as_generate_does(chains, network, evaluation):
    """Right is the last token before the end of the turn."""
    prompts = prompts_of(chains, network, ARMS["sft"])
    said = [generate(chains, network, row, reflect=False)[1] for row in range(len(prompts.last))]
    assert all(tokens[-1] == evaluation.end for tokens in said)
    last = torch.tensor([tokens[-2] for tokens in said])
    assert all(evaluation.continue_text(prompts, prompts.embeds(1), last, evaluation.latent_ids))
    assert not any(evaluation.continue_text(prompts, prompts.embeds(1), last + 1, evaluation.latent_ids))


def test_filler_is_a_reflection_fed_with_the_slots_own_embedding(chains, network, evaluation):
    rows = chains.tokens.rows(alone(chains), ARMS["filler"], CPU)
    embedding = network.core.get_input_embeddings().weight[evaluation.slot_id].detach()
    right = []
    for row in range(len(rows.ids)):
        given = {"latents": embedding.expand(1, 8, -1), "latent_feedback": "hidden"}
        said = generate(chains, network, row, reflect=True, **given)[1][10:]
        right.append(said[-2:] == [evaluation.examples[row].glyph, evaluation.end])
    assert evaluation.text(rows, slots=True) == counted(evaluation, right)
