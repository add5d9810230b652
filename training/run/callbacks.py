"""What a checkpoint holds besides weights and optimiser, and how a preempted run ends."""

import signal
import threading
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .meters import sum_over_ranks


NAMED_ROWS = 10


class RunProgress(TrainerCallback, ExportableState):
    """Kept in each checkpoint's trainer_state.json: the stage, the tokens seen, the rows that were skipped."""

    def __init__(self, stage: str):
        self.stage = stage
        self.num_tokens = 0
        self.skipped: list[str] = []

    def state(self) -> dict:
        attributes = {"num_tokens": self.num_tokens, "skipped": self.skipped}
        return {"args": {"stage": self.stage}, "attributes": attributes}

    def restore(self, state: dict):
        self.num_tokens = state["attributes"]["num_tokens"]
        self.skip(state["attributes"]["skipped"])

    def skip(self, messages: list[str]):
        """Notes rows by what is wrong with them, each once however often an epoch comes to it."""
        self.skipped = list(dict.fromkeys([*self.skipped, *messages]))

    def gather_skipped(self):
        """Lets every rank know of all ranks' skipped rows; all of them have to call it."""
        self.skip(gather_object(self.skipped))

    def report(self) -> str | None:
        """How many rows were skipped, and the first of them by name."""
        if not self.skipped:
            return None
        lines = "\n".join(f"- {message}" for message in self.skipped[:NAMED_ROWS])
        return f"{len(self.skipped)} rows were skipped; the first of them:\n{lines}"


class PreemptionCallback(TrainerCallback):
    """On SIGTERM, which schedulers send before they take a machine, the run writes a checkpoint and ends.

    All ranks stop after the same step, whichever of them got the signal.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.requested = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.requested = False
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def on_step_end(self, args, state, control, **kwargs):
        if sum_over_ranks(torch.tensor(float(self.requested)), self.accelerator):
            self.requested = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, signum, frame):
        self.requested = True


def outlive_sigterm(worker_id: int, running: torch.Tensor, then: Callable[[int], None] | None = None):
    """`worker_init_fn` of a data loader: its workers ignore SIGTERM while `running`, in shared memory, is true.

    After a run that failed, Python ends workers by this very signal, and waits for them. `then` is called next.
    """

    def ignore_while_running(signum, frame):
        if not running:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, ignore_while_running)
    if then is not None:
        then(worker_id)
