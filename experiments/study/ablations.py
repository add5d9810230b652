"""Runs the study: trains what is missing, evaluates it, and writes a result file for each arm.

`python -m experiments.study.ablations --form quick`

A result is written after every arm and seed, and a trained part is kept: called again after an interruption, the study goes on
with what is missing. `--render` trains nothing and writes the summary and the plots of what there is.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.evaluation.glyphsearch_accuracy import evaluate_glyphsearch
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions, sha256
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint

from ..chains.network import starting_model
from .ablation_plots import draw_all
from .ablation_tables import as_frame, main_tables, read_findings, read_results, summarise
from .arms import Form, Study, StudyArm, read_study


FOLDER = Path(__file__).parent
RECIPE = FOLDER / "study_part.yaml"
DIFFICULTY = "study"
# Scenes of arms lie behind those of the base; each seed has its own.
FIRST_SCENE, SCENES_A_SEED = 10_000_000, 1_000_000
BATCH_SIZE = 32


class StudyRun:
    """One run of the study, or what is left of it.

    Args:
        study (`Study`): The arms.
        form (`Form`): How large it is.
        work (`Path`): A folder for checkpoints and logs, which later runs go on from.
        output (`Path`): A folder for the result files.
    """

    def __init__(self, study: Study, form: Form, work: Path, output: Path):
        self.study, self.form, self.work, self.output = study, form, work, output

    def __call__(self) -> None:
        """Runs what is missing.

        Raises:
            ValueError: Results of another form, another definition of an arm or another base.
            RuntimeError: A training ended with an error.
        """
        base = self.train_base()
        missing = self.missing(sha256(base / "model.safetensors"))
        for name, seed in tqdm(missing, unit="arm"):
            arm = self.study.arms[name]
            self.add(arm, seed, self.evaluate(arm, self.train(arm, seed, base)))

    def missing(self, base: str | None = None) -> list[tuple[str, int]]:
        """The arms and seeds that have no results, in the order in which they are run.

        Args:
            base (`str`, *optional*): The hash of the base that results must have started from.
        """
        results = {name: self.results(arm, base) for name, arm in self.study.arms.items()}
        runs = [(arm.name, seed) for arm, seed in self.study.runs(self.form)]
        return [(name, seed) for name, seed in runs if str(seed) not in results[name]["seeds"]]

    def train(self, arm: StudyArm, seed: int, start: Path) -> Path:
        """Trains an arm's parts, one after another; returns the last one's checkpoint."""
        folder = self.work / f"seed{seed}"
        for index, (part, name) in enumerate(zip(arm.parts, arm.part_names)):
            folder = folder / name
            options = part | {"seed": seed}
            if index == 0:
                options["model_options"] = json.dumps({"has_bcm": True, "has_dac": True} | arm.model_options)
            first = FIRST_SCENE + seed * SCENES_A_SEED + index * self.form.part_steps * BATCH_SIZE
            start = train_once(options, start, first, self.form.part_steps, folder / "checkpoint")
        return start

    def train_base(self) -> Path:
        """Trains what all arms start from: the backbone that `save_start` writes, tuned to answer at once."""
        start = self.work / "start"
        if not start.is_dir():
            save_start(start)
        options = {"stage": "sft", "seed": 0, "model_options": json.dumps({"has_bcm": False, "has_dac": False})}
        first = FIRST_SCENE - SCENES_A_SEED
        return train_once(options, start, first, self.form.base_steps, self.work / "base" / "checkpoint")

    def evaluate(self, arm: StudyArm, checkpoint: Path) -> dict:
        """Decodes the test scenes in all ways of an arm."""
        model, processor = load_checkpoint(checkpoint)
        ways = {
            way: evaluate_glyphsearch(model, processor, self.form.scenes, "test", DIFFICULTY, **options)
            for way, options in arm.evaluate.items()
        }
        return {"machine": describe_machine(model.device), "evaluations": ways}

    def results(self, arm: StudyArm, base: str | None = None) -> dict:
        """An arm's result file, or the beginning of one.

        Raises:
            ValueError: A file of another form, another definition of the arm or another base.
        """
        path = self.output / f"{arm.name}.json"
        settings = {
            "arm": arm.name,
            "form": self.form.name,
            "part_steps": self.form.part_steps,
            "base_steps": self.form.base_steps,
            "scenes": self.form.scenes,
            "parts": arm.parts,
            "model_options": arm.model_options,
            "evaluate": arm.evaluate,
        }
        settings |= {} if base is None else {"base": base}
        if not path.is_file():
            return settings | {"seeds": {}}
        found = json.loads(path.read_text())
        if different := [name for name, value in settings.items() if found.get(name) != value]:
            raise ValueError(
                f"{path}: holds results with {different[0]} = {found.get(different[0])!r}, not {settings[different[0]]!r}. "
                "Choose another --output, give the --work folder that the results came from, or delete the file."
            )
        return found

    def add(self, arm: StudyArm, seed: int, result: dict) -> None:
        """Adds a seed's results to an arm's file, whole or not at all."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.output / f"{arm.name}.json"
        report = self.results(arm, sha256(self.train_base() / "model.safetensors"))
        report["seeds"][str(seed)] = {"date": date, "versions": describe_versions(), **result}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(path)


def save_start(folder: Path) -> None:
    """Writes the embedded checkpoint as it was before stage `path`; its modules are new, which the base does without."""
    model = starting_model(0, "none", torch.device("cpu"))
    model.generation_config.latent_feedback = "hidden"
    draft = folder.with_name(folder.name + ".part")
    model.to(torch.bfloat16).save_pretrained(draft)
    VReflectionProcessor.from_pretrained(EMBEDDED).save_pretrained(draft)
    draft.rename(folder)


def train_once(options: dict, start: Path, first_scene: int, steps: int, folder: Path) -> Path:
    """Trains into a folder, unless an earlier run did; what was interrupted is trained again from its start.

    Raises:
        RuntimeError: The training ended with an error.
    """
    if folder.is_dir():
        return folder
    scenes = {
        "difficulty": DIFFICULTY,
        "split": "train",
        "count": steps * BATCH_SIZE,
        "start": first_scene,
        "paths": False,  # one box a reflection, as in the paper
    }
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    options |= {
        "model_name_or_path": start,
        "dataset_options": json.dumps(scenes),
        "max_steps": steps,
        "output_dir": draft,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = folder.with_name(folder.name + ".log")
    with log.open("w") as file:
        command = [sys.executable, "-m", "vreflection_training", str(RECIPE), *words]
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise RuntimeError(f"training {folder} ended with {ended.returncode}; see {log}")
    draft.rename(folder)
    return folder


def write_summary(study: Study, run: StudyRun) -> None:
    """Writes `summary.md`, `tables.md` and the plots of the results that there are."""
    results = read_results(study, run.output)
    frame, output = as_frame(results), run.output
    (output / "summary.md").write_text(
        summarise(study, run.form, results, run.missing(), read_findings(output)), encoding="utf-8"
    )
    (output / "tables.md").write_text(main_tables(study, frame) + "\n", encoding="utf-8")
    draw_all(study, frame, output)


def main(arguments: list[str] | None = None) -> None:
    """`python -m experiments.study.ablations`."""
    study = read_study()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study.ablations",
        description="Trains the tiny model in all the ways that the paper compares, and tests whether its latents matter.",
    )
    parser.add_argument("--form", choices=study.forms, default="quick", help="how large (default: quick)")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="checkpoints (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=FOLDER / "results", help="default: results/ beside this program"
    )
    parser.add_argument("--render", action="store_true", help="train nothing; render the result files that there are")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    form = study.forms[options.form]
    run = StudyRun(study, form, options.work / form.name, options.output / form.name)
    if not options.render:
        run()
    write_summary(study, run)


if __name__ == "__main__":
    main()
