import subprocess
import sys
from dataclasses import replace

import pytest
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
    """In a new process: one that has run tests may write into memory that it was given before, or free some meanwhile."""
    writes = f"print(flush=True); input(); written = b'x' * {80 * MB}; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", writes], text=True, **pipes) as process:
        process.stdout.readline()
        before = resident(process.pid)
        print(file=process.stdin, flush=True)
        process.stdout.readline()
        after = resident(process.pid)
        process.communicate("\n")
    for kind in ("anonymous", "resident"):
        assert 79 * MB < after[kind] - before[kind] < 85 * MB  # the system counts in batches of pages


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match="can't be loaded"):
        measure_loading(tmp_path)
