"""One measurement of random weights of a shape so small that it takes seconds."""

import json

import pytest
import torch
from tiny_shape import TINY

from vreflection_hub_card.efficiency.measure import measure, shape_subject


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(scope="session")
def subject(cpu, tmp_path_factory):
    return shape_subject("tiny", TINY, cpu, 0, tmp_path_factory.mktemp("shape"))


@pytest.fixture(scope="session")
def result(subject, cpu):
    measured = measure(subject, cpu, repeats=2, text_steps=2, batch_sizes=(1, 8))
    return json.loads(json.dumps({"command": "vreflection efficiency", **measured}))  # as its file holds it
