"""What a step of `generate` does not do: project, look or wait for the device where nobody reads the result."""

import pytest
import torch
from generation_helpers import decode
from reference import encode

from modeling_vreflection.decoding_vreflection import ReflectionOptions, ReflectionProgress


def test_a_step_that_is_forced_in_all_rows_does_not_project(model, processor, prompts):
    calls = []
    inputs = encode(processor, *prompts[:2])
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        decode(model, inputs, new_tokens=14, reflect=True)
        # Not after the start token, the slots but the last, and the last: 9 of 14.
        assert len(calls) == 14 - 9
        calls.clear()
        decode(model, inputs, new_tokens=14, reflect=False)
        assert len(calls) == 14
        calls.clear()
        decode(
            model, inputs, [{0}, {3}], new_tokens=14
        )  # steps 4 to 9 are forced in both, and from the 5th that is known
        assert len(calls) == 14 - 5
    finally:
        hook.remove()


def test_within_reflections_of_all_rows_nothing_is_asked_of_the_device(ids):
    """Tokens on the meta device have no values: whoever asks for one, and so would wait for a GPU, fails."""
    progress = ReflectionProgress(ReflectionOptions(3, "hidden"), ids)
    start, slot, _ = ids
    tokens = torch.tensor([[start, slot, slot], [5, start, slot]])
    for length, forced_steps in ((1, 0), (2, 0), (3, 2)):  # what the host knows, it knows from the tokens before
        progress.read(tokens[:, :length])
        assert progress.forced_steps == forced_steps and progress.in_slots == (length > 1)
    assert progress.left.tolist() == [2, 3]
    progress.read(torch.empty(2, 4, dtype=torch.long, device="meta"))
    assert progress.forced_steps == 1 and progress.in_slots
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        progress.read(torch.empty(2, 5, dtype=torch.long, device="meta"))  # the first row leaves: it must ask again


def test_a_reflection_of_every_row_is_known_before_its_first_token(ids):
    progress = ReflectionProgress(ReflectionOptions(3, "hidden", reflect=True), ids)
    for length, forced_steps in ((2, 4), (3, 3), (4, 2), (5, 1)):
        progress.read(torch.empty(2, length, dtype=torch.long, device="meta"))
        assert progress.forced_steps == forced_steps and progress.in_slots == (length > 2)


def test_the_host_waits_for_no_number_of_the_tokens_that_it_has_just_been_given(ids):
    """It asks at one step, and reads at the next."""

    class Late(torch.Tensor):
        """Raises where a value is read in the step in which it was made."""

        step = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__):
                assert args[0].made < cls.step
            if isinstance(result, cls):
                result.made = cls.step
            return result

    start, slot, end = ids
    progress = ReflectionProgress(ReflectionOptions(2, "hidden"), ids)
    tokens = torch.tensor([[5, start, slot, slot, end, 6, 7], [5, 5, 5, start, slot, slot, end]])
    for length in range(1, 8):
        Late.step = length
        given = tokens[:, :length].as_subclass(Late)
        progress.read(given)
        left = torch.Tensor(progress.left.as_subclass(torch.Tensor).float()).tolist()
        assert left == [[0, 3, 2, 1, 0, 0, 0][length - 1], [0, 0, 0, 3, 2, 1, 0][length - 1]]
        assert progress.in_slots == bool((given.as_subclass(torch.Tensor)[:, -1] == slot).any())


def test_a_text_step_gets_what_the_stock_class_gets(model, processor, prompts):
    given = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    try:
        decode(model, encode(processor, *prompts[:2]), [{1}, {4}], new_tokens=16)
    finally:
        hook.remove()
    # The prompt, then the tokens; those from the first row's first slot to the second row's last one feed back.
    feeds = ["latent_state" in names for names in given]
    assert feeds == [False] * 3 + [True] * 11 + [False] * 2
    assert all("skip_logits" in names for names, feeding in zip(given, feeds) if feeding)
    assert not any("skip_logits" in names for names, feeding in zip(given, feeds) if not feeding)
