"""What a run starts from: with another number of latent steps, the processor alone renders what the run's would."""

import pytest

from vreflection_training.loading import load_model_and_processor, load_processor


MESSAGES = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "Here."}]},
]


@pytest.mark.parametrize("start", ["checkpoint", "backbone"])
@pytest.mark.parametrize("steps", [3, 8])
def test_the_processor_alone_is_the_runs(request, start, steps):
    folder = str(request.getfixturevalue(start))
    options = {"num_latent_tokens": steps, "has_bcm": False}
    model, processor = load_model_and_processor(folder, **options)
    alone = load_processor(folder, **options)
    assert alone.chat_template == processor.chat_template
    assert alone.num_latent_tokens == processor.num_latent_tokens == steps
    assert alone.apply_chat_template(MESSAGES).count("<|lvr|>") == model.config.num_latent_tokens == steps
