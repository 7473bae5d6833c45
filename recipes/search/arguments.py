"""What several commands accept."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return number


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where the model runs, such as cpu or cuda:0 (default: a GPU if there is one)")
