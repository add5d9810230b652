"""Streamers get the prompt and the words, and no token of a reflection."""

import torch
from generation_helpers import STARTS, decode
from reference import END, SLOT, START, encode
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer


class Collect(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_the_words(model, processor, prompts, ids):
    inputs = encode(processor, prompts[0])
    streamer = Collect()
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer)[0].tolist()
    assert streamer.values[0] == inputs["input_ids"].tolist()
    assert [token for value in streamer.values[1:] for token in value] == [t for t in tokens if t not in ids]
    assert streamer.ended == 1


def test_a_streamer_that_counts_for_the_usage_counts_hidden_tokens_too(model, processor, prompts):
    inputs = encode(processor, prompts[0])

    class Counting(Collect):
        total_tokens = -1  # the prompt is no answer

        def put(self, value):
            self.total_tokens += 1

    streamer = Counting()
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer)[0]
    assert streamer.total_tokens == len(tokens)


def test_a_streamer_may_be_given_by_position(model, processor, prompts, ids):
    inputs = encode(processor, prompts[0])
    prompt, streamer = inputs.pop("input_ids"), Collect()
    options = {"max_new_tokens": 12, "reflect": True, "do_sample": False}
    tokens = model.generate(prompt, None, None, None, None, None, None, streamer, **inputs, **options)
    assert streamer.values[1:] == [[token] for token in tokens[0, prompt.shape[1] :].tolist() if token not in ids]


def test_text_streamer_never_shows_placeholders(model, processor, prompts, ids, words_only, capsys):
    inputs = encode(processor, prompts[0])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)  # doesn't skip special tokens by itself
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer, **words_only)[0].tolist()
    shown = capsys.readouterr().out
    assert ids[0] in tokens and not any(name in shown for name in (START, SLOT, END))
    assert shown.strip() == processor.decode(tokens, skip_special_tokens=True).strip()


def test_text_iterator_streamer_gives_the_decoded_text(model, processor, prompts, words_only):
    inputs = encode(processor, prompts[1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=10)
    tokens = decode(model, inputs, STARTS[1:2], streamer=streamer, **words_only)[0].tolist()
    assert "".join(streamer) == processor.decode(tokens, skip_special_tokens=True)


def test_a_streamer_of_several_rows_can_tell_them_apart(model, processor, prompts):
    inputs = encode(processor, *prompts[:2])
    streamer = Collect()
    tokens = decode(model, inputs, STARTS[:2], streamer=streamer)
    assert torch.tensor(streamer.values[1:]).T.tolist() == tokens.tolist()
