"""`vit-jax bench`: measurements of this machine."""

from __future__ import annotations

import argparse

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
  bench.add_argument("name", metavar="NAME", choices=_BENCHMARKS, help=f"one of {listed}")
  bench.add_argument("--json", metavar="FILE", help="also write the figures to this file")
  bench.add_argument(
    "--against", choices=("torch",), help="a peer that must be there (it is measured wherever it is there)"
  )
  bench.add_argument("--seconds", type=float, default=20.0, help="for which each row is measured (default: 20)")


def _bench(args: argparse.Namespace) -> None:
  from vit_jax import bench
  from vit_jax.bench.peer import PEER_PYTHON, peer_python

  if args.against and peer_python() is None:
    raise UserError(
      f"--against={args.against}: there is no PyTorch in this environment. Install the extra `bench`, or set "
      f"{PEER_PYTHON} to a Python that has it."
    )
  bench.run(args.name, json=destination(args.json, "--json", endings=(".json",)), seconds=args.seconds)
