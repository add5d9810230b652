"""Run by tests in a process of its own: what a stranger does with a Hub id. Arguments: the id, and its revision."""

import hashlib
import json
import sys


for name in ("modeling_vreflection", "vreflection_hub_card", "vreflection_training"):
    sys.modules[name] = None

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402


repo_id, revision = sys.argv[1:]
how = {"revision": revision, "trust_remote_code": True}
processor = AutoProcessor.from_pretrained(repo_id, **how)
model = AutoModelForImageTextToText.from_pretrained(repo_id, **how)
pipe = pipeline("image-text-to-text", model=repo_id, **how)
content = [{"type": "image", "image": Image.new("RGB", (112, 112), "red")}, {"type": "text", "text": "Which glyph?"}]
messages = [{"role": "user", "content": content}]
decoding = {"max_new_tokens": 16, "do_sample": False, "reflect": True}
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
new = model.generate(**inputs, **decoding)[0, inputs["input_ids"].shape[1] :].tolist()
piped = pipe(text=messages, return_full_text=False, generate_kwargs=decoding)[0]["generated_text"]
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(
    json.dumps(
        {
            "class": type(model).__name__,
            "processor": type(processor).__name__,
            "latents": new.count(model.config.latent_token_id),
            "text": processor.decode(new, skip_special_tokens=True),
            "piped": piped,
            "bits": digest.hexdigest(),
        }
    )
)
