"""Never more than one shard in memory, whatever the checkpoint's size."""

import json
import subprocess
import sys

import pytest
import torch
from released_checkpoints import save_shards, write
from safetensors.torch import load_file, save_file

from vreflection_hub_card.conversion.converter import convert
from vreflection_hub_card.conversion.shards import Stored, Weight, write_shards


MIB = 2**20
# Peak of what the process holds, mapped files included, over what it held before.
MEASURED = """
import re, sys
from pathlib import Path
from vreflection_hub_card.conversion.shards import Weight, read_headers, write_shards

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

weights = {name: Weight(stored, stored.shape) for name, stored in read_headers(Path(sys.argv[1])).items()}
# What is imported by the first call is no memory of the conversion.
first = next(iter(weights))
write_shards(Path(sys.argv[2]).with_name("first"), {first: weights[first]}, int(sys.argv[3]), lambda: None)
before = resident()
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
write_shards(Path(sys.argv[2]), weights, int(sys.argv[3]), lambda: None)
high = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(high - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 6])
def test_the_peak_is_a_shard_and_not_the_checkpoint(tmp_path, files):
    """Of 24 weights of 8 MiB, in one file or in six, shards of 32 MiB."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "first").mkdir()
    weights = {f"weight_{number:02d}": torch.full((2 * MIB,), float(number)) for number in range(24)}
    save_shards(tmp_path / "in", weights, files)
    del weights
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(tmp_path / "out"), str(32 * MIB)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 16 * MIB < int(ran.stdout) < 56 * MIB
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


def test_shards_and_their_index(released, converted, tmp_path):
    convert(released, tmp_path / "out", max_shard_size="2MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5 and files == sorted(set(index["weight_map"].values()))
    expected, found = load_file(converted / "model.safetensors"), {}
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 2_000_000
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        found |= held
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_rows_are_filled_and_others_kept(tmp_path):
    """The mean of the rows that the tokenizer knows, in float32, in whichever of the three rows are new."""
    table = torch.randn(10, 4).to(torch.bfloat16)
    save_file({"a": table}, tmp_path / "in.safetensors")
    weight = Weight(Stored(tmp_path / "in.safetensors", "a", (10, 4), torch.bfloat16), (12, 4), filled_from=9)
    assert write_shards(tmp_path, {"b": weight}, "1MB", lambda: None) == ["model.safetensors"]
    written = load_file(tmp_path / "model.safetensors")["b"]
    assert torch.equal(written[:9], table[:9])
    mean = (sum(table[:9].double()) / 9).to(torch.bfloat16)
    assert all(torch.equal(row, mean) for row in written[9:])


def test_how_the_source_is_cut_doesnt_matter(tmp_path):
    """A single file with several shards' worth, legacy names, half precision."""
    write(tmp_path / "in", shards=1, legacy=True, dtype=torch.bfloat16)
    convert(tmp_path / "in", tmp_path / "out", max_shard_size="1MB")
    write(tmp_path / "other", shards=5, legacy=True, dtype=torch.bfloat16)
    convert(tmp_path / "other", tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    pieces = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        pieces |= load_file(path)
    assert pieces.keys() == whole.keys() and all(torch.equal(pieces[name], whole[name]) for name in whole)
