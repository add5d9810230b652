"""Run by test_loading.py in a process of its own: what a stranger does with a checkpoint's folder, and nothing else.

Arguments: the folder, a picture, a folder to save to, and modules that can't be imported here.
"""

import hashlib
import json
import sys


class Hidden:
    """A finder that doesn't find some modules."""

    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, *args):
        find = getattr(self.finder, "find_spec", None)
        return None if find is None or name.partition(".")[0] in self.names else find(name, *args)

    def find_distributions(self, *args):
        find = getattr(self.finder, "find_distributions", None)
        return [] if find is None else find(*args)


folder, picture, saved, *hidden = sys.argv[1:]
sys.meta_path[:] = [Hidden(finder, hidden) for finder in sys.meta_path]

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)


CONTENT = [{"type": "image", "image": picture}, {"type": "text", "text": "Which glyph?"}]
MESSAGES = [{"role": "user", "content": CONTENT}]
DECODING = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "reflect": True}


def bits(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def decode(model, processor):
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, **DECODING)[0, inputs["input_ids"].shape[1] :].tolist()


config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
models = [
    auto.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
models[0].save_pretrained(saved)
processor.save_pretrained(saved)
again = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)

result = {
    "config": [type(config).__name__, config.model_type, config.latent_token_ids],
    "processor": [type(processor).__name__, processor.tokenizer.padding_side],
    "models": sorted({type(model).__name__ for model in models}),
    "bits": [bits(model) for model in (*models, pipe.model, again)],
    "tokens": [decode(model, processor) for model in models]
    + [decode(again, AutoProcessor.from_pretrained(saved, trust_remote_code=True))],
    "text": pipe(text=MESSAGES, return_full_text=False, generate_kwargs=DECODING)[0]["generated_text"],
    "expected_text": processor.decode(decode(models[0], processor), skip_special_tokens=True),
    "imported": [name for name in hidden if name in sys.modules],
}
print(json.dumps(result))
