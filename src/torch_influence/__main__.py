"""python -m torch_influence: info, selftest, demo."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from torch_influence import backend_info, self_test


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_influence", description="Influence functions for PyTorch.")
    parser.add_argument("--version", action="version", version=version("torch-influence"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what runs natively, on which devices, and why not otherwise")
    commands.add_parser("selftest", help="run every native op against its reference; fails if one is wrong")
    commands.add_parser("demo", help="find mislabelled handwritten digits by their influence", add_help=False)
    arguments, rest = parser.parse_known_args(argv)

    if arguments.command == "demo":
        from torch_influence import demo  # its dependencies are an extra

        return demo.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(f"torch-influence {version('torch-influence')}")
    if arguments.command == "selftest":
        outcome = self_test()
        print(outcome)
        return 0 if outcome.passed else 1
    print(backend_info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
