"""What the tests of `generate` share."""

import torch
from reference import OpenReflections, attend, with_positions


NEW_TOKENS = 26
# Rows enter and leave at different steps; the first row reflects twice, in the last one a reflection ends with the text.
STARTS = ({0, 13}, {3}, {6}, {15})


def decode(model, inputs, starts=None, new_tokens=NEW_TOKENS, **kwargs):
    """New tokens (B, T) of a run that doesn't end early; `starts` opens reflections as `OpenReflections` does."""
    length = inputs["input_ids"].shape[1]
    processors = [] if starts is None else [OpenReflections(model.config.latent_start_token_id, length, *starts)]
    kwargs = {"do_sample": False, "min_new_tokens": new_tokens, **kwargs}
    result = model.generate(**inputs, max_new_tokens=new_tokens, logits_processor=processors, **kwargs)
    return result[:, length:] if isinstance(result, torch.Tensor) else result


def new_tokens_of(result, inputs):
    return result.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def stock_tokens(stock, inputs, new_tokens):
    sequences = stock.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return sequences[:, inputs["input_ids"].shape[1] :]


def looker(model, row):
    """What a state sees in all images of a row, and where it looks: functions of (D,)."""
    sincos = model.config.patch_positions == "sincos"
    read = [with_positions(*image) if sincos else image[0] for image in zip(row.features, row.grids)]

    def ask_dac(state):
        return attend(model.model.dac, state[None, None], torch.cat(read)[None])

    return lambda state: ask_dac(state)[0][0, 0], lambda state: ask_dac(state)[1][0, 0]
