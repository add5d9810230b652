"""The command `vreflection`: finds the subcommand and runs it. What a subcommand needs is imported when it runs."""

import argparse
import importlib.metadata
import sys

from vreflection_hub_card.errors import InputError

from .commands import ask, card, check, convert, evaluate, merge, publish, space, train


COMMANDS = (ask, train, check, merge, evaluate, convert, card, publish, space)


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        `int`: The exit code: 2, with one line on stderr, for wrong input; 1 for a run that failed; 130
        for a training that Ctrl+C ended.
    """
    options = build_parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except InputError as error:
        return fail(str(error))
    except OSError as error:  # a folder that can't be read, a network that is down
        where = f"{error.filename}: " if error.filename else ""
        return fail(where + (error.strerror or str(error)))


def main_train(argv: list[str] | None = None) -> int:
    """`vreflection-train`: `vreflection train`, and `check` and `merge` under the same name."""
    argv = sys.argv[1:] if argv is None else argv
    return main(argv if argv and argv[0] in ("check", "merge") else ["train", *argv])


def fail(message: str) -> int:
    """Prints what went wrong in one line, and returns the exit code for it."""
    print("vreflection: " + " ".join(message.split()), file=sys.stderr)
    return 2


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
