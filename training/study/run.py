"""Runs the study: trains parts that no earlier run finished, evaluates, and writes a result file an arm."""

import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from vreflection_hub_card.evaluation.glyphsearch_accuracy import evaluate_glyphsearch
from vreflection_hub_card.evaluation.interventions import LatentInterventionModel
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions, sha256
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint

from .table import Arm, Form, Study


DIFFICULTY = "study"
BASE = "base"
# Scenes of arms lie behind those of the base; each seed has its own.
FIRST_SCENE, SCENES_A_SEED = 10_000_000, 1_000_000
BATCH_SIZE = 32


class PartFailed(RuntimeError):
    """A part of an arm ended with an error, which is in its log."""


class StudyRun:
    """One run of the study, or what is left of it.

    Args:
        study (`Study`): The table.
        form (`Form`): How large it is.
        work (`Path`): A folder for checkpoints and logs, which later runs go on from.
        output (`Path`): A folder for the result files.
        hours (`float`, *optional*): After so many hours nothing new is begun.
    """

    def __init__(self, study: Study, form: Form, work: Path, output: Path, hours: float | None = None):
        self.study, self.form, self.work, self.output = study, form, work, output
        self.deadline = None if hours is None else time.monotonic() + 3600 * hours

    def __call__(self) -> list[tuple[str, int]]:
        """Runs what is missing and what no other process is running; returns the arms and seeds that are still missing."""
        self.output.mkdir(parents=True, exist_ok=True)
        locks = self.work / "running"
        locks.mkdir(parents=True, exist_ok=True)
        if self.deadline is None or time.monotonic() <= self.deadline:
            self.check_base()
        with tqdm(self.missing(), unit="arm") as progress:
            for name, seed in progress:
                progress.set_description(f"{name}, seed {seed}")
                if self.deadline is not None and time.monotonic() > self.deadline:
                    break
                arm = self.study.arms[name]
                try:
                    with FileLock(locks / f"{name}-{seed}.lock", timeout=0):
                        if (name, seed) in self.missing():
                            self.add(arm, seed, self.evaluate(arm, self.train(arm, seed)))
                except Timeout:
                    continue
        return self.missing()

    def check_base(self):
        """Makes sure that all arms start from one base.

        Raises:
            ValueError: Results that came from another base than the one in the work folder.
        """
        base = sha256(self.train_base() / "model.safetensors")
        for name in self.study.arms:
            path = self.output / f"{name}.json"
            if path.is_file() and json.loads(path.read_text())["base"] != base:
                raise ValueError(
                    f"{path}: its arm started from another base than {self.work / BASE}; extend results with the --work folder "
                    "they came from, or choose another --output"
                )

    def missing(self) -> list[tuple[str, int]]:
        """The arms and seeds that have no results, in the order in which they are run."""
        return [
            (arm.name, seed)
            for arm, seed in self.study.units(self.form)
            if str(seed) not in self.results(arm)["seeds"]
        ]

    def train(self, arm: Arm, seed: int) -> Path:
        """Trains an arm's parts, one after another; returns the last one's checkpoint."""
        start = self.train_base()
        first = FIRST_SCENE + seed * SCENES_A_SEED
        count = self.form.part_steps * BATCH_SIZE
        folder = self.work / f"seed{seed}"
        for index, (part, name) in enumerate(zip(arm.parts, arm.part_names)):
            folder = folder / name
            scenes = {"difficulty": DIFFICULTY, "split": "train", "count": count, "start": first + index * count}
            options = part | {
                "model_name_or_path": str(start),
                "dataset_options": json.dumps(scenes),
                "max_steps": self.form.part_steps,
                "seed": seed,
            }
            if index == 0:
                options["model_options"] = json.dumps({"has_bcm": True, "has_dac": True} | arm.model_options)
            start = train_once("study_part", options, folder / "checkpoint")
        return start

    def train_base(self) -> Path:
        """Trains what all arms start from: the embedded checkpoint without its modules, tuned to answer at once."""
        scenes = {
            "difficulty": DIFFICULTY,
            "split": "train",
            "count": self.form.base_steps * BATCH_SIZE,
            "start": FIRST_SCENE - SCENES_A_SEED,
        }
        options = {
            "model_name_or_path": str(EMBEDDED),
            "model_options": json.dumps({"has_bcm": False, "has_dac": False}),
            "dataset_options": json.dumps(scenes),
            "stage": "sft",
            "max_steps": self.form.base_steps,
            "seed": 0,
        }
        return train_once("study_part", options, self.work / BASE)

    def evaluate(self, arm: Arm, checkpoint: Path) -> dict:
        """Decodes the test scenes in all ways of an arm."""
        model, processor = load_checkpoint(checkpoint, None, LatentInterventionModel)
        ways = {
            way: evaluate_glyphsearch(model, processor, self.form.scenes, "test", DIFFICULTY, **options)
            for way, options in arm.evaluate.items()
        }
        return {"machine": describe_machine(model.device), "evaluations": ways}

    def results(self, arm: Arm) -> dict:
        """An arm's result file, or the beginning of one.

        Raises:
            ValueError: A file of another form or of another definition of the arm.
        """
        path = self.output / f"{arm.name}.json"
        asked = {
            "arm": arm.name,
            "form": self.form.name,
            "part_steps": self.form.part_steps,
            "base_steps": self.form.base_steps,
            "base_start": sha256(EMBEDDED / "model.safetensors"),
            "scenes": self.form.scenes,
            "parts": arm.parts,
            "model_options": arm.model_options,
            "evaluate": arm.evaluate,
        }
        if not path.is_file():
            return asked | {"seeds": {}}
        found = json.loads(path.read_text())
        different = [name for name, value in asked.items() if found.get(name) != value]
        if different:
            raise ValueError(
                f"{path}: holds results for {different[0]} = {found.get(different[0])!r}, not {asked[different[0]]!r}; "
                "choose another --output, or delete the file"
            )
        return found

    def add(self, arm: Arm, seed: int, result: dict):
        """Adds a seed's results to an arm's file."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.output / f"{arm.name}.json"
        with FileLock(self.work / "running" / f"{arm.name}.lock"):  # another process may be adding another seed
            report = self.results(arm)
            report["base"] = sha256(self.work / BASE / "model.safetensors")
            report["seeds"][str(seed)] = {"date": date, "versions": describe_versions(), **result}
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(report, indent=1) + "\n")
            draft.replace(path)


def train_once(recipe: str, options: dict, folder: Path) -> Path:
    """Trains into a folder, unless an earlier run did; what a kill left half done is done again.

    Raises:
        PartFailed: The training ended with an error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):  # arms that begin alike, in two processes
        if folder.is_dir():
            return folder
        draft = folder.with_name(folder.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        log = folder.with_name(folder.name + ".log")
        with log.open("w") as file:
            command = [sys.executable, "-m", "vreflection_training", recipe, *words, "--output_dir", str(draft)]
            ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if ended.returncode:
            raise PartFailed(f"training {folder} ended with {ended.returncode}; see {log}")
        draft.rename(folder)
    return folder
