"""Checkpoints that survive a killed run: which are complete, and whether a run can resume from them."""

import errno
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

# transformers' own names.
MARKER = "checkpoint-is-incomplete.txt"
TRAINER_STATE_NAME = "trainer_state.json"
# What a checkpoint needs besides weights, by the names that the engines give it: without one, transformers would begin it anew.
STATES = {
    "weights": ("*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    "optimiser state": ("optimizer.*", "optimizer_*", "global_step*"),
    "scheduler state": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


class CheckpointError(ValueError):
    """A checkpoint that a run can't resume from."""


@contextmanager
def marked_incomplete(folder: str | Path, main_process: bool = True) -> Iterator[None]:
    """Marks a checkpoint as incomplete until all of it is on the disk, so that it also survives a power cut.

    One that can't be written is removed, to free its space: `OSError`. A `FloatingPointError` removes it, too.
    """
    folder = Path(folder)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        sync(folder)
    try:
        yield
        if main_process:
            sync(folder)
    except FloatingPointError:
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception as error:
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**30
        kept = whole_checkpoints(folder.parent)
        advice = f"{kept[-1]} is whole: resume from it." if kept else "No earlier checkpoint is whole."
        raise OSError(f"{folder} couldn't be written ({error}); {free:.1f} GiB are free there. {advice}") from error
    if main_process:
        (folder / MARKER).unlink()
        sync(folder)


def sync(folder: Path, recursive: bool = True):
    """Waits until a folder, its name and its files are on the disk. Windows has no such call for folders."""
    if os.name == "nt":
        return
    inside = folder.rglob("*") if recursive else filter(Path.is_file, folder.iterdir())
    for path in [*inside, folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as of network file systems that can't sync folders
                raise
        finally:
            os.close(descriptor)


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
    """The checkpoint that a run is to resume from: `True` means the last one of its output folder that can be used.

    A newer one that is damaged is named in the log. `CheckpointError` if there is none, if one with fewer steps was written
    later, by another run, or if the one that was named was never written to the end or is damaged.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        damages, whole = [], whole_checkpoints(output_dir)
        # Backwards: of those of one time, as a file system with coarse times has them, the one with the most steps.
        newest = max(whole[::-1], key=lambda folder: Path(folder, TRAINER_STATE_NAME).stat().st_mtime_ns, default=None)
        if whole and newest != whole[-1]:
            raise CheckpointError(
                f"{newest} was written after {whole[-1]}, which has more steps, so they are of two runs: name the one to go on "
                "with by `--resume_from_checkpoint FOLDER`, or move the other one away."
            )
        for folder in reversed(whole):
            damage = find_damage(folder)
            if damage is None:
                for line in damages:
                    logger.warning(f"{line}: the run resumes from {folder}.")
                return folder
            damages.append(damage)
        raise CheckpointError(". ".join([f"No whole checkpoint to resume from in {output_dir}", *damages]) + ".")
    if Path(resume_from_checkpoint, MARKER).exists():
        raise CheckpointError(
            f"{resume_from_checkpoint} was being written when its run ended: resume from an earlier checkpoint, or from "
            "the last whole one with `resume_from_checkpoint=True`."
        )
    if (damage := find_damage(resume_from_checkpoint)) is not None:
        raise CheckpointError(
            f"{damage}: resume from another checkpoint, or begin a new run from its weights, without "
            f"`resume_from_checkpoint`, by `--model_name_or_path {resume_from_checkpoint}`."
        )
    return str(resume_from_checkpoint)


def find_damage(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint's files: a line, or `None`. Of large files only their structure is looked at."""
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{folder} is no checkpoint of a run: it has no {TRAINER_STATE_NAME}"
    for what, patterns in STATES.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{folder} holds no {what} ({patterns[0]})"
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text())
                for shard in set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else ():
                    if not (folder / shard).is_file():
                        return f"{folder} lacks {shard}, which {path.name} names"
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{path} is damaged (cut off, or no file of torch)"
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            return f"{path} is damaged ({error})"
    return None


def load_progress(checkpoint: str, key: str) -> dict:
    """What a callback named `key` stored in a checkpoint; `CheckpointError` if it stored nothing."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
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


def check_same_settings(checkpoint: str, stored: dict | None, settings: dict):
    """`CheckpointError` for a checkpoint of other settings or data: with its optimiser and schedule they would be ignored, or
    the run would be neither the one nor the other. Checkpoints from before settings were kept pass."""
    changed = [name for name, value in settings.items() if stored and name in stored and stored[name] != value]
    if changed:
        changes = ", ".join(f"`{name}` was {stored[name]!r} and is {settings[name]!r}" for name in changed)
        raise CheckpointError(
            f"{checkpoint} belongs to a run of other settings: {changes}. Set them back to resume, or begin a new run from "
            f"its weights: leave `resume_from_checkpoint` out and set --model_name_or_path {checkpoint}."
        )


def check_space(output_dir: str | Path, needed: int):
    """Raises an `OSError` where a folder can't be written, or has less room than the bytes that are needed."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has no room for a checkpoint: about {needed / 2**30:.1f} GiB are needed, and {free / 2**30:.1f} GiB free."
        )
