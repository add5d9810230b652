"""Runs isolated.py on a folder, and checks what comes of it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from reference import picture


OUR_MODULES = ["modeling_vreflection", "vreflection_hub_card", "vreflection_training"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_isolated(model, folder, tmp_path, *hidden):
    """Loads the folder of `model` where none of our packages, nor the `hidden` ones, can be imported; returns what came of it."""
    picture(1).save(tmp_path / "picture.png")
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    arguments = [folder, tmp_path / "picture.png", tmp_path / "saved", *OUR_MODULES, *hidden]
    script = Path(__file__).parent / "isolated.py"
    done = subprocess.run(
        [sys.executable, "-I", script, *map(str, arguments)],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["imported"] == []
    config = model.config
    assert result["config"] == [type(config).__name__, config.model_type, list(config.latent_token_ids)]
    assert result["processor"] == [model.processor_class.__name__, "left"]
    assert result["models"] == [type(model).__name__]
    assert len(set(result["bits"])) == 1
    assert all(tokens == result["tokens"][0] for tokens in result["tokens"])
    assert result["text"] == result["expected_text"]
    assert sha256(tmp_path / "saved" / "model.safetensors") == sha256(folder / "model.safetensors")
    return result
