"""Trains the start of all arms and writes it as a checkpoint: `python -m experiments.reward.start FOLDER`.

A path run that is stopped while its learning rate is high. A call that was stopped goes on.
"""

import argparse
from pathlib import Path

from experiments.chains.embed import make_checkpoint


ARM, SEED = "path", 0
SCHEDULE = "--steps 10000 --stop_at 6800 --batch 5 --learning_rate 1e-3 --scenes 12000 --device cpu"


def make_start(folder: Path, *options: str) -> None:
    """Trains in `folder / "run"`, where a later call goes on, and writes the checkpoint beside it; `options` as of `train`."""
    make_checkpoint(ARM, SEED, folder / "run", folder, *options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    make_start(parser.parse_args().folder, *SCHEDULE.split())
