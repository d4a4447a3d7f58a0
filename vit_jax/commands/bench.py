"""`vit-jax bench`: measurements of this machine."""

from __future__ import annotations

import argparse
import math

from vit_jax.commands.common import destination
from vit_jax.commands.flags import Commands, add
from vit_jax.config.errors import UserError

_BENCHMARKS = {
  "attention": "by the number of tokens",
  "data": "the input pipeline",
  "inference": "features of a ViT-B/16",
  "knn": "the nearest neighbours of an evaluation",
  "startup": "launch to first step",
  "step": "a training step",
}


def add_to(commands: Commands) -> None:
  """Its flags."""
  bench = add(
    commands, "bench", _bench, "measure the speed of a part on this machine, beside a peer where there is one"
  )
  listed = "; ".join(f"{name}: {what}" for name, what in _BENCHMARKS.items())
  bench.add_argument("name", metavar="NAME", nargs="?", choices=_BENCHMARKS, help=f"one of {listed}")
  bench.add_argument("--list", action="store_true", help="show the cases of NAME, or of all, and measure nothing")
  bench.add_argument(
    "--case",
    action="append",
    default=[],
    metavar="CASE",
    help="measure this case only, of those that --list shows; several by commas, or by giving the flag again",
  )
  bench.add_argument("--json", metavar="FILE", help="also write the figures to this file, after every row")
  bench.add_argument(
    "--against", choices=("torch",), help="a peer that must be there (it is measured wherever it is there)"
  )
  bench.add_argument(
    "--seconds", type=_seconds, default=20.0, metavar="S", help="for which each row is measured (default: 20)"
  )


def _seconds(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, at least 0")
  return value


def _bench(args: argparse.Namespace) -> None:
  if args.name is None and not args.list:
    raise UserError(f"bench: name what to measure, one of {', '.join(_BENCHMARKS)}, or show the cases with --list")
  from vit_jax import bench
  from vit_jax.bench.peer import PEER_PYTHON, peer_python

  cases = [case.strip() for text in args.case for case in text.split(",")]
  if args.list:
    print(_listed([args.name] if args.name else list(_BENCHMARKS), cases))
    return
  if args.against and peer_python() is None:
    raise UserError(
      f"--against={args.against}: there is no PyTorch in this environment. Install the extra `bench`, or set "
      f"{PEER_PYTHON} to a Python that has it."
    )
  output = destination(args.json, "--json", endings=(".json",))
  try:
    bench.run(args.name, json=output, seconds=args.seconds, cases=cases)
  except OSError as error:
    raise UserError(f"--json={args.json}: cannot be written: {error.strerror}; the rows are above") from error


def _listed(names: list[str], cases: list[str]) -> str:
  """The cases of some benchmarks as a table."""
  from vit_jax import bench
  from vit_jax.commands.common import line_width
  from vit_jax.inspect.columns import align

  width, parts = line_width(), []
  for name in names:
    heading = align([(f"{name}:", bench.BENCHMARKS[name])], keep=(0,), width=width)
    rows = [(f"  {part.name}", part.what) for part in bench.parts(name, cases)]
    parts.append(f"{heading}\n{align(rows, keep=(0,), width=width)}")
  return "\n\n".join(parts)
