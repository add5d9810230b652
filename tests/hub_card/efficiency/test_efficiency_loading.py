import os
from dataclasses import replace

import pytest
import torch
from tiny_shape import TINY

from vreflection_hub_card.efficiency.loading import measure_loading, resident
from vreflection_hub_card.efficiency.measure import shape_subject
from vreflection_hub_card.errors import InputError


MB = 1_000_000


def test_loading_holds_the_weights_once(cpu, tmp_path):
    """Two tables of 64 MB each; what else loading needs is smaller."""
    shape = replace(TINY, text={**TINY.text, "vocab_size": 250_000})
    subject = shape_subject("wide", shape, cpu, 0, tmp_path)
    found = measure_loading(tmp_path)
    assert found["weights_bytes"] == 4 * subject.description["parameters"] > 128 * MB
    assert found["weights_bytes"] < found["peak_resident_bytes"] < found["weights_bytes"] + 40 * MB
    assert found["peak_anonymous_bytes"] < 40 * MB


def test_what_a_process_writes_is_counted():
    before = resident(os.getpid())
    written = torch.ones(20 * MB)
    after = resident(os.getpid())
    for kind in ("anonymous", "resident"):
        assert 4 * len(written) <= after[kind] - before[kind] + MB < 5 * len(written)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match="can't be loaded"):
        measure_loading(tmp_path)
