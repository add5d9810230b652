"""The command `vreflection`: finds the subcommand and runs it. What a subcommand needs is imported when it runs."""

import argparse
import importlib.metadata
import sys
import traceback

from vreflection_hub_card.errors import InputError, first_line

from .commands import ask, card, check, convert, evaluate, merge, publish, space, train


COMMANDS = (ask, train, check, merge, evaluate, convert, card, publish, space)


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        `int`: The exit code: 2, with one line on stderr, for wrong input; 1 for a run that failed, with
        one line for an error that nobody foresaw, too; 130 for a training that Ctrl+C ended.
    """
    options = build_parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except InputError as error:
        return fail(str(error))
    except OSError as error:  # a folder that can't be read, a network that is down
        where = f"{error.filename}: " if error.filename else ""
        return fail(where + (error.strerror or str(error)))
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return fail(unforeseen(error), 1)


def main_train(argv: list[str] | None = None) -> int:
    """`vreflection-train`: `vreflection train`, and `check` and `merge` under the same name."""
    argv = sys.argv[1:] if argv is None else argv
    return main(argv if argv and argv[0] in ("check", "merge") else ["train", *argv])


def fail(message: str, code: int = 2) -> int:
    """Prints what went wrong in one line, and returns the exit code for it."""
    print("vreflection: " + " ".join(message.split()), file=sys.stderr)
    return code


def unforeseen(error: Exception) -> str:
    """An error of the program's or a library's own, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    # From a worker of the data loader an error comes with its traceback as the message; its last line is the error.
    message = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else first_line(error)
    kind = type(error).__name__
    message = message if message.startswith(kind) else f"{kind}: {message}"
    return f"{message} (at {place.filename}:{place.lineno}; PYTHONDEVMODE=1 shows the traceback)"


def build_parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets `run`, a function of the parsed options that returns an exit code or `None`."""
    parser = argparse.ArgumentParser(
        prog="vreflection", description="V-Reflection: a vision-language model that looks again while it thinks."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("vreflection"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
