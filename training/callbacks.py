"""What a run remembers beside weights and optimiser, and how it ends when the machine is taken away."""

import signal
import threading

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


NAMED_ROWS = 10


class RunProgress(TrainerCallback, ExportableState):
    """Kept in each checkpoint's trainer_state.json: the stage, the tokens seen, the rows that were skipped.

    Args:
        stage (`str`): The training stage.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self.num_tokens = 0
        self.num_skipped = 0
        self.first_skipped: list[str] = []

    def state(self) -> dict:
        attributes = {name: getattr(self, name) for name in ("num_tokens", "num_skipped", "first_skipped")}
        return {"args": {"stage": self.stage}, "attributes": attributes}

    def restore(self, state: dict):
        for name, value in state["attributes"].items():
            setattr(self, name, value)

    def skip(self, messages: list[str]):
        self.num_skipped += len(messages)
        self.first_skipped = (self.first_skipped + messages)[:NAMED_ROWS]


class PreemptionCallback(TrainerCallback):
    """On SIGTERM the run writes a checkpoint after the step it is in, and ends.

    Schedulers of preemptible machines send SIGTERM some time before they take the machine. All ranks stop after the same
    step, whichever of them got the signal.

    Args:
        accelerator (`Accelerator`): Tells the ranks of one another.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.requested = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def on_step_end(self, args, state, control, **kwargs):
        if self.accelerator.num_processes > 1:
            requests = torch.tensor(float(self.requested), device=self.accelerator.device)
            self.requested = bool(self.accelerator.reduce(requests, reduction="sum"))
        if self.requested:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, signum, frame):
        self.requested = True
