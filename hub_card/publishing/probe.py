"""Run in a process of its own: a stranger loads a checkpoint by `trust_remote_code` and asks it about a picture.

Arguments: a folder or Hub id, its revision or nothing, and modules that a stranger doesn't have. The last line on stdout is
JSON: `{"latents": …, "text": …}`, or `{"error": …}`.
"""

import json
import sys


SIDE = 112
ANSWER_LENGTH = 8


def main(model_id: str, revision: str, *hidden: str) -> dict:
    """Loads and asks; returns what came out."""
    for name in hidden:
        sys.modules[name] = None  # Python then says that there is no such module

    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, logging

    logging.disable_progress_bar()
    how = {"trust_remote_code": True, "revision": revision or None}
    processor = AutoProcessor.from_pretrained(model_id, **how)
    model, report = AutoModelForImageTextToText.from_pretrained(
        model_id, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **how
    )
    wrong = {name for name, *_ in report["mismatched_keys"]} | {*report["missing_keys"], *report["unexpected_keys"]}
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing, unknown or of another shape, {min(wrong)} first")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    ramp = Image.linear_gradient("L").resize((SIDE, SIDE))
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    steps = getattr(model.generation_config, "latent_steps", None)
    steps = model.config.num_latent_tokens if steps is None else steps
    # A plain backbone, with no latent steps, can't reflect.
    forced = {"reflect": True} if steps else {}
    sequences = model.generate(**inputs, max_new_tokens=steps + 2 + ANSWER_LENGTH, do_sample=False, **forced)
    new = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    start, slot, end = model.config.latent_token_ids
    if steps and new[: steps + 2] != [start, *[slot] * steps, end]:
        raise ValueError(f"a reflection was asked for, and the answer begins with the tokens {new[: steps + 2]}")
    return {"latents": new.count(slot), "text": processor.decode(new, skip_special_tokens=True)}


if __name__ == "__main__":
    try:
        result = main(*sys.argv[1:])
    except Exception as error:  # whatever it is: it goes to whoever publishes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__}
    print("\n" + json.dumps(result))
