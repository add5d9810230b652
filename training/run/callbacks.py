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
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunProgress(TrainerCallback, ExportableState):
    """Kept in each checkpoint's trainer_state.json: stage and settings, the tokens seen, the rows that were skipped."""

    def __init__(self, stage: str, settings: dict | None = None):
        self.stage = stage
        self.settings = settings
        self.num_tokens = 0
        self.skipped: list[str] = []

    def state(self) -> dict:
        attributes = {"num_tokens": self.num_tokens, "skipped": self.skipped}
        return {"args": {"stage": self.stage, "settings": self.settings}, "attributes": attributes}

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
    """On SIGTERM, which schedulers send before they take a machine, and on Ctrl+C the run writes a checkpoint and ends.

    All ranks stop after the same step, whichever of them got the signal: one whose number can be divided by `every`. In the
    last step there is nothing to end, and the run is completed. A second Ctrl+C ends it at once.

    Attributes:
        requested (`signal.Signals`): What ended the run before its last step.
    """

    def __init__(self, accelerator: Accelerator, every: int = 1):
        self.accelerator = accelerator
        self.every = every
        self.received: signal.Signals | None = None
        self.requested: signal.Signals | None = None
        self._previous = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = self.requested = None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._request) for number in ENDING_SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps or state.global_step % self.every:
            return
        number = int(sum_over_ranks(torch.tensor(float(self.received or 0)), self.accelerator))
        if number:
            # Where several ranks got one, the sum is none of them.
            self.requested = self.received or (signal.Signals(number) if number in ENDING_SIGNALS else signal.SIGTERM)
            control.should_save = control.should_training_stop = True

    def restore_handlers(self):
        """Gives the signals back to whom they belonged before the run."""
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _request(self, signum, frame):
        self.received = signal.Signals(signum)
        signal.signal(
            signal.SIGINT, self._previous[signal.SIGINT] or signal.SIG_DFL
        )  # the second one is heard at once


def outlive_signals(worker_id: int, running: torch.Tensor, then: Callable[[int], None] | None = None):
    """`worker_init_fn` of a data loader: its workers ignore SIGTERM and Ctrl+C while `running`, in shared memory, is true.

    After a run that failed, Python ends workers by SIGTERM, and waits for them. `then` is called next.
    """

    def ignore_while_running(signum, frame):
        if not running:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    for number in ENDING_SIGNALS:
        signal.signal(number, ignore_while_running)
    if then is not None:
        then(worker_id)
