"""What the plugin for vLLM decides without vLLM; with it, `.ci/vllm` compares answers with `generate`'s."""

import json
from types import SimpleNamespace

import pytest
import torch

from modeling_vreflection import VReflectionConfig
from modeling_vreflection.decoding_vreflection import ReflectionForcing, ReflectionOptions, ReflectionProgress
from vreflection_hub_card.embedded import EMBEDDED
from vreflection_hub_card.serving.picture_pool import PicturePool
from vreflection_hub_card.serving.request_reflections import DepartedRequests, RequestReflections
from vreflection_hub_card.serving.served_options import ServedOptions


IDS = START, SLOT, END = 386, 387, 388
THINK_END = 300


@pytest.fixture(scope="module")
def config():
    return VReflectionConfig.from_pretrained(EMBEDDED)


@pytest.fixture
def server(config):
    return ServedOptions(config, {}, json.loads((EMBEDDED / "generation_config.json").read_text()))


def params(extra_args=None, **given):
    contradicting = dict.fromkeys(
        ("structured_outputs", "thinking_token_budget", "trace_decode_token_ids", "repetition_detection")
    )
    given = {**contradicting, "skip_special_tokens": True, "max_tokens": None, **given}
    return SimpleNamespace(extra_args=extra_args, **given)


def test_defaults_are_the_generation_configs(server, config):
    assert server.of_request(None) == ReflectionOptions(8, "dac")
    assert server.uses_dac
    overridden = ServedOptions(config, {"latent_feedback": "hidden", "reflect": True}, {"latent_feedback": "dac"})
    assert overridden.of_request({}) == ReflectionOptions(8, "hidden", True) and not overridden.uses_dac


def test_requests_set_their_own(server):
    given = {"latent_steps": 3, "reflect": 1, "latent_tolerance": 0.1, "of_another_plugin": 1}
    assert server.of_request(given) == ReflectionOptions(3, "dac", True, 0.1)
    assert server.of_request({"reflect": 0}).reflect is False


@pytest.mark.parametrize(
    "given, message",
    [
        (params({"latent_steps": 2.5}), "whole number"),
        (params({"reflect": 2}), "`reflect` must be"),
        (params({"reflect": 1.0}), "`reflect` must be"),
        (params({"reflect": "uncertain"}), "isn't served by vLLM"),
        (params({"latent_tolerance": 2}), "in \\[0, 1\\]"),
        (params({"latent_feedback": "hidden"}), "the server's"),
        (params(structured_outputs=object()), "structured_outputs"),
        (params(repetition_detection=object()), "repetition_detection"),
        (params(skip_special_tokens=False), "placeholders"),
        (params({"reflect": 1}, max_tokens=10), "leaves none for the answer"),
    ],
)
def test_wrong_requests_are_refused(server, given, message):
    with pytest.raises(ValueError, match=message):
        server.check_request(given)


def test_without_reflections_all_is_allowed(server):
    server.check_request(params({"reflect": 0}, structured_outputs=object(), skip_special_tokens=False))
    server.check_request(params({"reflect": 1}, max_tokens=11))


def test_prompts_with_slots_or_without_a_picture_are_refused(server, config):
    server.check_request(params())
    server.check_prompt([1, 2])
    for token in IDS:
        with pytest.raises(ValueError, match="holds tokens of a reflection"):
            server.check_prompt([1, config.image_token_id, token])
    server.check_request(params({"reflect": 1}))
    with pytest.raises(ValueError, match="has no picture"):
        server.check_prompt([1, 2])
    server.check_request(params({"reflect": 1}))
    server.check_prompt([1, config.image_token_id])
    server.check_prompt([1, 2])  # of no request


def test_checkpoints_that_cannot_look_are_refused(config):
    plain = VReflectionConfig.from_dict({**config.to_dict(), "has_dac": False})
    with pytest.raises(ValueError, match="needs a checkpoint with DAC"):
        ServedOptions(plain, {}, {"latent_feedback": "dac"})
    with pytest.raises(ValueError, match="no latent tokens"):
        ServedOptions(VReflectionConfig.from_dict({**config.to_dict(), "latent_token_id": None}), {})


def forced_by_generate(options, answer, think_end_id=None):
    """The token that `generate` forces after an answer so far."""
    progress = ReflectionProgress(options, IDS, think_end_id=think_end_id)
    progress.prompt_length = 1
    tokens = torch.tensor([[5, *answer]])
    for length in range(2, tokens.shape[1] + 1):
        progress.read(tokens[:, :length])
    scores = ReflectionForcing(IDS, progress)(tokens, torch.zeros(1, 512))
    return int(scores.argmax()) if scores.isinf().any() else None


@pytest.mark.parametrize("think_end_id", [None, THINK_END])
@pytest.mark.parametrize("reflect", [None, True])
def test_forces_what_generate_forces(reflect, think_end_id):
    options = ReflectionOptions(3, "hidden", reflect)
    reflection = [START, SLOT, SLOT, SLOT, END]
    thoughts = [] if think_end_id is None and reflect else [7, THINK_END, 9]
    answer = [*thoughts, *reflection, 8, *reflection, THINK_END, 9, 4]
    request = RequestReflections(options, IDS, 1, think_end_id)
    for length in range(len(answer) + 1):
        assert request.forced_token == forced_by_generate(options, answer[:length], think_end_id), length
        anew = RequestReflections(options, IDS, 1, think_end_id)
        anew.start_over(answer[:length])
        assert anew.forced_token == request.forced_token
        if length < len(answer):
            request.read(answer[length])


def test_a_look_at_rest_ends_the_reflection():
    request = RequestReflections(ReflectionOptions(5, "dac", None, 0.2), IDS, 10)
    looks = [[1.0, 0.0], [0.5, 0.5], [0.45, 0.55]]
    forced = []
    for token, look in zip([START, SLOT, SLOT, SLOT], [None, *looks]):
        request.read(token)
        if look:
            request.keep_look(request.length - 1, torch.tensor(look))
        forced.append(request.forced_token)
    assert forced == [SLOT, SLOT, SLOT, END]
    request.start_over([START, SLOT, SLOT])  # preempted: one slot less
    assert request.forced_token == SLOT and 13 not in request.looks


def test_nothing_starts_without_a_picture():
    request = RequestReflections(ReflectionOptions(3, "dac", True), IDS, 1, may_start=False)
    assert request.forced_token is None and not request.may_start


def test_states_belong_to_a_position():
    request = RequestReflections(ReflectionOptions(3, "hidden"), IDS, 4)
    request.read(START)
    request.keep_state(torch.ones(2))
    assert request.state_for(5).tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="position 6 is lost"):
        request.state_for(6)
    request.latents = {5: torch.ones(2), 6: torch.ones(2)}
    request.start_over([START, SLOT])
    assert list(request.latents) == [5]


def test_departed_requests_are_bounded():
    departed = DepartedRequests(2)
    for name in "abc":
        request = RequestReflections(ReflectionOptions(3, "hidden"), IDS, 4)
        request.keep_state(torch.ones(2))
        departed.keep(name, request)
    departed.keep("d", RequestReflections(ReflectionOptions(3, "hidden"), IDS, 4))  # its tokens tell all
    assert list(departed.kept) == ["b", "c"]
    assert departed.take("a") is None and departed.take("b") is not None and list(departed.kept) == ["c"]


def test_the_pool_keeps_the_latest_pictures():
    pool = PicturePool(6, (2, 3), torch.float32)
    pictures = {name: torch.randn(length, 2, 3) for name, length in zip("abcd", (2, 3, 2, 6))}
    pool.put("a", pictures["a"])
    pool.put("b", pictures["b"])
    assert pool.touch("a")
    pool.put("c", pictures["c"])  # "b" was used longest ago
    assert pool.touch("a") and pool.touch("c") and not pool.touch("b")
    assert torch.equal(pool.gather(["c", "a", "c"]), torch.cat([pictures[name] for name in "cac"]))
    pool.put("d", pictures["d"])
    assert torch.equal(pool.gather(["d"]), pictures["d"]) and not pool.touch("a")
    with pytest.raises(ValueError, match="7 merged patches"):
        pool.put("e", torch.randn(7, 2, 3))
    pool.clear()
    assert not pool.touch("d") and len(pool.free) == 6
    for name in "aa":  # one picture twice in a prompt
        pool.put(name, pictures[name])
    assert len(pool.free) == 4
