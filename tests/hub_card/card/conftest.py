"""A published checkpoint, facts of a training, and results of the paper's benchmarks that nobody measured."""

import json
import shutil
from pathlib import Path

import pytest

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.scorers import summarise_verdicts
from vreflection_hub_card.evaluation.statistics import proportion
from vreflection_hub_card.inference.checkpoints import EMBEDDED


RESULTS = Path(__file__).parents[3] / "hub_card" / "results"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded checkpoint without a card."""
    shutil.copytree(EMBEDDED, tmp_path / "tiny", ignore=shutil.ignore_patterns("README.md", ".eval_results"))
    return tmp_path / "tiny"


@pytest.fixture
def results():
    """The embedded checkpoint's result files."""
    return sorted(RESULTS.glob("vreflection_tiny*.json"))


@pytest.fixture
def facts():
    """Facts of a stage 1 of the 7B, made up."""
    run = {
        "stage": "1",
        "title": "stage 1, BCM",
        "started_from": "Qwen/Qwen2.5-VL-7B-Instruct",
        "data": [
            {"format": "messages", "dataset": "someone/rows", "split": "train", "weight": 3},
            {"format": "visual_cot", "local": "viscot_363k.json"},
        ],
        "losses": {"L_BCM": 0.25},
        "options": {"latent_inputs": "bcm", "latent_loss": "l1"},
        "optimiser": {"optim": "adamw_torch", "learning_rate": 1e-5},
        "batch": {"per_device": 1, "accumulation": 8, "processes": 4, "samples_per_pack": 4, "max_length": 16384},
        "precision": "bf16",
        "steps": 2500,
        "tokens": 1234567,
        "versions": {"torch": "2.15.0", "trl": "1.16.0"},
        "machine": {"processor": "some CPU", "gpu": "some GPU"},
    }
    return {"base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "from_scratch": False, "runs": [run]}


@pytest.fixture
def write_result(tmp_path):
    """Writes what `vreflection evaluate` does for a checkpoint's folder, with the scores of made-up answers."""

    def write(folder, name="results.json", task="vstar", options=(), data=None, **report):
        benchmark = BENCHMARKS[task]
        groups = [{"category": "direct_attributes"}] * 115 + [{"category": "relative_position"}] * 76
        wrong_every = {"strict": 4, "authors": 5, "authors_table": 6, "exact": 4, "exact_match": 4}
        samples = []
        for index, group in enumerate(groups):
            verdicts = {name: {"letter": "A", "correct": index % every != 0} for name, every in wrong_every.items()}
            samples.append({"id": str(index), "groups": group, "verdicts": verdicts})
        scores = {scorer: summarise_verdicts(benchmark, samples, scorer) for scorer in benchmark.scorers}
        report = {
            "command": "vreflection evaluate tiny --tasks vstar",
            "date": "2026-11-23T10:00:00+00:00",
            "model": {"name": "tiny", "sha256": {f.name: sha256(f) for f in folder.glob("*.safetensors")}},
            "options": {
                "latent_steps": 8,
                "latent_feedback": "dac",
                "reflect": None,
                "min_pixels": 3136,
                "max_pixels": 12845056,
                **dict(options),
            },
            "limit": None,
            "versions": {"torch": "2.15.0", "transformers": "5.23.0", "lmms-eval": "0.7.3"},
            "machine": {"processor": "some CPU", "gpu": "some GPU"},
            "tasks": {
                task: {
                    "data": data or {"dataset": benchmark.dataset, "revision": benchmark.revision},
                    **scores,
                    "reflection_rate": proportion([True] * 180 + [False] * 11),
                }
            },
        } | report
        path = tmp_path / name
        path.write_text(json.dumps(report))
        return path

    return write
