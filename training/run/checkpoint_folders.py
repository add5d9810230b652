"""Checkpoints that survive a killed run: which are complete, and whether a run can resume from them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import sort_checkpoints


# transformers' own names.
MARKER = "checkpoint-is-incomplete.txt"
TRAINER_STATE_NAME = "trainer_state.json"


class CheckpointError(ValueError):
    """A checkpoint that a run can't resume from."""


@contextmanager
def marked_incomplete(folder: str | Path, main_process: bool = True) -> Iterator[None]:
    """Marks a checkpoint as incomplete while it is written. One that fails is removed, to free its space: `OSError`."""
    folder = Path(folder)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    try:
        yield
    except Exception as error:
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**30
        kept = whole_checkpoints(folder.parent)
        advice = f"{kept[-1]} is whole: resume from it." if kept else "No earlier checkpoint is whole."
        raise OSError(f"{folder} couldn't be written ({error}); {free:.1f} GiB are free there. {advice}") from error
    if main_process:
        (folder / MARKER).unlink()


def whole_checkpoints(output_dir: str | Path) -> list[str]:
    """The checkpoints of a folder that were written to the end, oldest first."""
    return [
        folder
        for folder in sort_checkpoints(str(output_dir))
        if Path(folder, TRAINER_STATE_NAME).is_file() and not Path(folder, MARKER).exists()
    ]


def remove_incomplete(output_dir: str | Path):
    """Removes what killed runs left half written."""
    for marker in Path(output_dir).glob(f"checkpoint-*/{MARKER}"):
        shutil.rmtree(marker.parent)


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """The checkpoint that a run is to resume from: `True` means the last whole one of its output folder.

    `CheckpointError` if there is none, or the one that was named was never written to the end.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        found = whole_checkpoints(output_dir)
        if not found:
            raise CheckpointError(f"No whole checkpoint to resume from in {output_dir}.")
        return found[-1]
    if Path(resume_from_checkpoint, MARKER).exists():
        raise CheckpointError(
            f"{resume_from_checkpoint} was being written when its run ended: resume from an earlier checkpoint, or from "
            "the last whole one with `resume_from_checkpoint=True`."
        )
    return str(resume_from_checkpoint)


def load_progress(checkpoint: str, key: str) -> dict:
    """What a callback named `key` stored in a checkpoint; `CheckpointError` if the folder isn't one of a run."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint of a run: it has no trainer_state.json.")
    stored = TrainerState.load_from_json(str(path)).stateful_callbacks.get(key)
    if stored is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint of this trainer: its trainer_state.json has no {key}.")
    return stored


def check_same_stage(checkpoint: str, stored: str, stage: str):
    """`CheckpointError` for a checkpoint of another stage: a stage starts anew, from weights alone."""
    if stored == stage:
        return
    folder = Path(checkpoint)
    if (folder / "adapter_config.json").is_file():
        how = f"merge it, `vreflection merge {folder} MERGED`, and start with --model_name_or_path MERGED"
    elif any(folder.glob("model*.safetensors")):
        how = f"vreflection train RECIPE --model_name_or_path {folder}"
    else:  # its weights are spread over the ranks' files; those of the finished run aren't
        how = f"finish that stage, then vreflection train RECIPE --model_name_or_path {folder.parent}"
    raise CheckpointError(
        f"{checkpoint} belongs to stage {stored!r}, and this run is stage {stage!r}: optimiser, schedule and data begin anew "
        f"with a stage. Leave `resume_from_checkpoint` out and start from its weights: {how}."
    )
