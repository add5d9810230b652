"""Ctrl+C ends a command with one line and 130, wherever it comes; the signal is sent to a process of its own."""

import signal
import subprocess
import sys

import pytest


COMMAND = """
import signal, sys
from vreflection_training import cli, entry

def command():
{body}
    return 0

cli.main = command
sys.exit(entry.main())
"""
CTRL_C = "signal.raise_signal(signal.SIGINT)"
FINISHED = "import atexit; atexit.register(signal.raise_signal, signal.SIGINT)"


def press(*lines, cwd):
    """Runs a command whose body are these lines."""
    code = COMMAND.format(body="\n".join("    " + line for line in lines))
    # A shell's background jobs ignore the signal, and so would what they start.
    listen = [sys.executable, "-c", code]
    return subprocess.run(
        listen,
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "lines",
    [
        [CTRL_C],
        ["try:", f"    {CTRL_C}", "except BaseException:", "    pass"],
        ["try:", f"    {CTRL_C}", "except BaseException as error:", "    raise ImportError('no numpy') from error"],
        ["class Held:", "    def __del__(self):", f"        {CTRL_C}", "Held()", "print('went on')"],
        ["import interrupted", "print('went on')"],
        ["import os", f"if not os.fork(): {CTRL_C}", "os.wait()", CTRL_C],
        ["try:", f"    {CTRL_C}", "finally:", f"    {CTRL_C}", "    print('went on')"],
    ],
    ids=["plain", "swallowed", "made another error", "dropped", "while importing", "in a worker, too", "twice"],
)
def test_ctrl_c_is_one_line_and_130(lines, tmp_path):
    (tmp_path / "interrupted.py").write_text(f"import signal\ntry:\n    {CTRL_C}\nexcept BaseException:\n    pass\n")
    ran = press(*lines, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "vreflection: interrupted\n")


def test_ctrl_c_lets_a_command_remove_what_is_half_written(tmp_path):
    lines = [
        "try:",
        "    open('draft', 'w').close()",
        f"    {CTRL_C}",
        "finally:",
        "    __import__('os').unlink('draft')",
    ]
    assert press(*lines, cwd=tmp_path).returncode == 130 and not (tmp_path / "draft").exists()


def test_ctrl_c_after_the_end_changes_nothing(tmp_path):
    ran = press(FINISHED, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_command_still_fails_as_it_does(tmp_path):
    ran = press("raise RuntimeError('ours')", cwd=tmp_path)
    assert ran.returncode == 1 and ran.stderr.endswith("RuntimeError: ours\n")
