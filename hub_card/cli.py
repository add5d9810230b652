"""The command `vreflection`: parses what is asked for and runs it."""

import argparse
import sys

import transformers

from .commands import ask, card, convert, efficiency, evaluate, publish, space
from .errors import InputError


COMMANDS = (ask, evaluate, efficiency, convert, card, publish, space)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2, with one line on stderr, where the input was to blame."""
    options = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options.run(options)
    except InputError as error:
        return fail(str(error))
    except OSError as error:  # a folder that may not be read, a network that is down
        where = f"{error.filename}: " if error.filename else ""
        return fail(where + (error.strerror or str(error)))
    except KeyboardInterrupt:
        print("vreflection: interrupted", file=sys.stderr)
        return 130
    return 0


def fail(message: str) -> int:
    """Says in one line what went wrong, and returns the exit code for it."""
    print("vreflection: " + " ".join(message.split()), file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets `run`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="vreflection", description="A vision-language model that looks again.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
