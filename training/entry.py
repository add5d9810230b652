"""What the console scripts start: Ctrl+C ends a command with one line and exit code 130, whatever it is doing."""

import os
import signal
import sys
from types import FrameType


INTERRUPTED = 130  # exit code after Ctrl+C, as shells have it


def main() -> int:
    """`vreflection`."""
    return run_command("main")


def main_train() -> int:
    """`vreflection-train`: `vreflection train`, and `check` and `merge` under the same name."""
    return run_command("main_train")


def run_command(name: str) -> int:
    """Runs a function of `cli` on the command line, and returns the exit code.

    Ctrl+C raises a `KeyboardInterrupt`, so that a command removes what is half-written. It ends the process at once the second
    time, and while a module is imported, since extension modules turn the exception into other errors.
    """
    process, interrupted = os.getpid(), False

    def leave():
        if os.getpid() == process:  # a forked worker has nothing to say
            os.write(2, b"vreflection: interrupted\n")
        os._exit(INTERRUPTED)

    def interrupt(signum: int, frame: FrameType | None):
        nonlocal interrupted
        if interrupted or os.getpid() != process or is_importing(frame):
            leave()
        interrupted = True
        raise KeyboardInterrupt

    def report_unraisable(problem):
        if interrupted:  # Python has dropped the exception, and would go on
            leave()
        sys.__unraisablehook__(problem)

    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # it isn't where a shell's background job ignores it
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = report_unraisable
    try:
        from . import cli

        code = getattr(cli, name)()
    except BaseException:  # also what a library made of the KeyboardInterrupt
        if not interrupted:
            raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end would be interrupted with a traceback
    if interrupted:
        leave()
    return code


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the program is."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
