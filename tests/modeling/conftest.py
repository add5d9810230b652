"""Conversations that the decoding tests share."""

import pytest
from reference import ask, encode, picture


@pytest.fixture(scope="module")
def prompts():
    return [
        ask("Which glyph is on the red triangle?", picture(1)),
        ask("What?", picture(2, (112, 56))),
        ask("Which glyph is on the shape left of the blue circle?", picture(3, (84, 140)), picture(4, (56, 56))),
        ask("Hello, who are you and what do you know?"),
    ]


@pytest.fixture(scope="module")
def batch(processor, prompts):
    return encode(processor, *prompts)
