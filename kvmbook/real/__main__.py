"""`python -m kvmbook.real`: what this machine's KVM offers. Where there is none, one sentence and exit code 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from kvmbook.real import differ, interrupted, questions, trace
from kvmbook.real.device import NoKvm, no_room
from kvmbook.real.offers import as_text, ask_machine


def show_offers(_: argparse.Namespace) -> int:
    """what this machine offers, and which of the book's claims can be tried on it (the default)"""
    print(as_text(ask_machine()))
    return 0


# A command answers with its exit code; some have arguments.
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "offers": show_offers,
    "ask": questions.show_answers,
    "differ": differ.show_differences,
    "record": differ.make_recording,
    "interrupt": interrupted.show_interrupted,
    "trace": trace.show_trace,
}
ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "ask": questions.add_arguments,
    "differ": differ.add_arguments,
    "record": differ.add_recording_arguments,
    "interrupt": interrupted.add_arguments,
    "trace": trace.add_arguments,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvmbook.real", description="The book's questions on this machine.")
    parser.set_defaults(command=show_offers)
    commands = parser.add_subparsers(title="commands", metavar="")
    for name, command in COMMANDS.items():
        its = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        its.set_defaults(command=command)
        if name in ARGUMENTS:
            ARGUMENTS[name](its)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.command(chosen)
        return code
    except (NoKvm, TimeoutError) as refusal:
        print(refusal.strerror, file=sys.stderr)
        return 1
    except OSError as refusal:
        if not (why := no_room(refusal)):
            raise
        print(why, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
