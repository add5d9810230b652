"""One batch of prompts, decoded once for a module, and from scratch at every step."""

import pytest
from generation_helpers import NEW_TOKENS, STARTS, decode
from reference import Row, decode_uncached, encode


@pytest.fixture(scope="module")
def eos(model):
    return model.generation_config.eos_token_id


@pytest.fixture(scope="module")
def words_only(processor, ids):
    """Keeps the model from writing other special tokens, so that all that it writes can be seen in the text."""
    return {"suppress_tokens": [token for token in processor.tokenizer.added_tokens_decoder if token not in ids]}


@pytest.fixture(scope="module")
def greedy(model, batch):
    """The batch of prompts, greedy, reflections opened by `STARTS`."""
    return decode(model, batch, STARTS, return_dict_in_generate=True, output_logits=True)


@pytest.fixture(scope="module")
def uncached(stock, batch, ids, eos):
    """The same from scratch at every step: a list of (tokens, logits)."""
    return [
        decode_uncached(Row(stock, batch, row), ids, NEW_TOKENS, STARTS[row], banned=eos) for row in range(len(STARTS))
    ]


@pytest.fixture(scope="module")
def one(processor, prompts):
    return encode(processor, prompts[0])
