"""`push_to_hub` of the model, the processor and the trainer: what arrives loads by `trust_remote_code` alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_hub_card.publishing.smoke_test import smoke_test
from vreflection_training import VReflectionSFTConfig


@pytest.mark.slow
def test_what_is_pushed_loads(hub, hub_environment, tmp_path):
    environment = hub_environment(os.environ["HF_TOKEN"])
    command = [sys.executable, Path(__file__).with_name("pushing.py"), EMBEDDED, "ann/pushed", "lab/trained", "run"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name in ("ann/pushed", "lab/trained"):
        repo = hub.repos["model", name]
        smoke_test(name, repo.head)
        stored = b"".join(file.content for file in repo.commits[repo.head].values())
        assert os.environ["HF_TOKEN"].encode() not in stored
    # Revisions in between, which a killed run leaves as the last one, have what the last one has.
    files = [set(repo.commits[commit]) for commit in repo.history()[:-1]]
    assert len(files) >= 2
    code = {path.name for path in EMBEDDED.glob("*_vreflection.py")}
    assert code and all(code < names for names in files)


def test_a_token_is_not_written_into_the_arguments(tmp_path):
    with pytest.raises(ValueError, match="hub_token"):
        VReflectionSFTConfig(str(tmp_path), hub_token="hf_" + "x" * 34, bf16=False, use_cpu=True)
