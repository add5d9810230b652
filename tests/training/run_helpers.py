"""What several tests of runs need."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from vreflection_training.stages import SFT_STAGES


# Of a test that builds on `checkpoint`. With `--backbone` the whole of a module runs on the other one.
on_both_backbones = pytest.mark.parametrize(
    "checkpoint", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)], indirect=True
)
# The recommended stage in the default suite, the others among the slow tests.
every_stage = pytest.mark.parametrize(
    "stage", ["path", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SFT_STAGES if stage != "path")]
)


class Rows(TorchDataset):
    """Rows as they are: `Dataset.from_list` would give text-only rows the columns of the others."""

    def __new__(cls, rows):
        return Dataset.from_dict({"index": range(len(rows))}).with_transform(
            lambda batch: {key: [rows[index][key] for index in batch["index"]] for key in ("id", "images", "messages")}
        )


def moved(before, after):
    """Names of parameters that differ in any bit."""
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def gradients(trainer):
    """One optimiser step with plain SGD at rate 1: the step is the gradient."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - value.detach() for name, value in trainer.model.named_parameters()}
