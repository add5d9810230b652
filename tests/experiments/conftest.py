"""A backbone so small that whole benchmarks run in seconds."""

from dataclasses import replace

import pytest
import torch

from experiments.benchmark.backbones import BACKBONES
from experiments.benchmark.decoding import random_subject


SMALL = BACKBONES["small"]
TINY = replace(
    SMALL,
    note="a tiny one",
    text=SMALL.text
    | {
        "vocab_size": 1031,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    vision=SMALL.vision
    | {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    },
    side=4,
    mix_divisor=32,
)


@pytest.fixture(scope="session")
def tiny_backbone():
    return TINY


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return random_subject("tiny", TINY, torch.device("cpu"), 0, tmp_path_factory.mktemp("backbone"))
