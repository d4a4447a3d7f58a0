"""The `vit-jax` command: reads the command line and calls the sub-command (`vit_jax/commands`).

Everything heavy is imported inside the sub-commands, so that `vit-jax --help` and a mistyped key answer at once. Errors
that are for the user are printed without a traceback, with exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import vit_jax
from vit_jax.commands import bench, data, inspect, planning, profiling, runs, weights
from vit_jax.commands.flags import Parser
from vit_jax.commands.job import is_for_user
from vit_jax.config.errors import UserError
from vit_jax.config.fields import key_meant

_OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit code."""
  _log_to_terminal()
  try:
    args = parse(sys.argv[1:] if argv is None else argv)
    return args.command(args) or 0
  except Exception as error:
    if not is_for_user(error):
      raise
    for line in str(error).splitlines():
      print(f"vit-jax: {line}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("vit-jax: interrupted", file=sys.stderr)
    return 130


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The parsed command line: `command` is the function to call with it, `overrides` its `--config.…` flags.

  The function returns an exit code where it is done and not all is well, else None.

  Raises:
    UserError: for an override without a value, or of a sub-command that takes no config; for what looks like one.
    SystemExit: by argparse, for `--help` (0) and wrong usage (2).
  """
  rest, overrides = _split_overrides(argv)
  parser = _parser()
  args, unknown = parser.parse_known_args(rest)
  if unknown:
    if hasattr(args, "config") and unknown[0].startswith("--") and (meant := key_meant(unknown[0][2:])):
      raise UserError(f"{unknown[0]}: no such flag; did you mean {_OVERRIDE}{meant}?")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
  if overrides and not hasattr(args, "config"):
    raise UserError(f"{overrides[0]}: this sub-command takes no config")
  args.overrides = overrides
  return args


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes `--config.a.b=value` and `--config.a.b value` out of a command line."""
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if not word.startswith(_OVERRIDE):
      rest.append(word)
    elif "=" in word:
      overrides.append(word)
    else:
      value = next(words, None)
      if value is None or value.startswith("--"):
        raise UserError(f"{word}: needs a value, as {word}=VALUE")
      overrides.append(f"{word}={value}")
  return rest, overrides


def _parser() -> argparse.ArgumentParser:
  parser = Parser(prog="vit-jax", description="Vision Transformers in JAX: DINOv3 self-supervised pretraining.")
  parser.add_argument("--version", action="version", version=f"vit-jax {vit_jax.__version__}")
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
  for group in (runs, weights, planning, profiling, inspect, bench, data):
    group.add_to(commands)
  return parser


def _log_to_terminal() -> None:
  """Shows what vit_jax says of its progress, and only warnings of the libraries beneath it.

  Comes before any library is imported: the first to set up logging decides its form.
  """
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("vit_jax").setLevel(logging.INFO)
