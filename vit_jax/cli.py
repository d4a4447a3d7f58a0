"""The `vit-jax` command: reads the command line and calls the sub-command (`vit_jax/commands`).

Everything heavy is imported inside the sub-commands, so that `vit-jax --help` and a mistyped key answer at once. Errors
that are for the user are printed without a traceback, with exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence

import vit_jax
from vit_jax.commands import bench, config, data, inspect, planning, profiling, runs, weights
from vit_jax.commands.flags import Parser
from vit_jax.commands.job import is_for_user
from vit_jax.config.errors import UserError
from vit_jax.config.fields import key_meant

_OVERRIDE = "--config."
_PATIENCE, _PATIENCE_OF_JOB = 2.0, 20.0  # seconds from the command's end to the process's; those of a job part first
_INTERRUPTED = (130, os.EX_TEMPFAIL)  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line, by default that of the process, which then ends, and returns its exit code."""
  _log_to_terminal()
  if argv is not None:
    return _run(argv, owns_process=False)
  if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error: a terminal without UTF-8, a file's odd name
    sys.stdout.reconfigure(errors="backslashreplace")
  ending = _Ending()
  try:
    ending.code = _run(sys.argv[1:], owns_process=True)
  except SystemExit as end:
    ending.code = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
  finally:
    ending.begin()
  return ending.code


def _run(argv: Sequence[str], *, owns_process: bool) -> int:
  try:
    args = parse(argv)
    args.owns_process = owns_process
    code = args.command(args) or 0
    sys.stdout.flush()
    return code
  except Exception as error:
    if isinstance(error, BrokenPipeError) and _nobody_reads():
      return 128 + signal.SIGPIPE
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
  for group in (runs, weights, planning, profiling, inspect, bench, data, config):
    group.add_to(commands)
  return parser


def _nobody_reads() -> bool:
  """Whether what reads standard output has ended, as `head` does; from then on, what is printed goes nowhere."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)  # an error is reported without being asked for
  ended = bool(poll.poll(0))
  if ended:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return ended


class _Ending:
  """Sees to it that the process ends with its code, whatever is still at work in it.

  Python waits for all threads and processes that it started: also for a read that hangs, and for a compilation that
  nobody needs any more. And where a library was interrupted in the middle, tidying up after it may crash.
  """

  def __init__(self) -> None:
    self.code = 1
    self._timer: threading.Timer | None = None
    atexit.register(self._last)  # before all others, to be called after them

  def begin(self) -> None:
    processes = sys.modules.get("vit_jax.parallel.processes")
    several = processes is not None and processes.current() is not None
    self._timer = threading.Timer(_PATIENCE_OF_JOB if several else _PATIENCE, self._end)
    self._timer.daemon = True
    self._timer.start()

  def _last(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      if self.code in _INTERRUPTED:
        self._end()

  def _end(self) -> None:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    os._exit(self.code)


def _log_to_terminal() -> None:
  """Shows what vit_jax says of its progress, and only warnings of the libraries beneath it.

  Comes before any library is imported: the first to set up logging decides its form.
  """
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("vit_jax").setLevel(logging.INFO)
