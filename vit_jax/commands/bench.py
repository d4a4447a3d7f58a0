"""`vit-jax bench`: measurements of this machine."""

from __future__ import annotations

import argparse

from vit_jax.commands.flags import Commands, add

_BENCHMARKS = ("attention", "data", "inference", "knn", "startup", "step")


def add_to(commands: Commands) -> None:
  """Its flags."""
  bench = add(
    commands, "bench", _bench, "measure the speed of a part on this machine, beside a peer where there is one"
  )
  bench.add_argument("name", metavar="NAME", choices=_BENCHMARKS, help=f"of {', '.join(_BENCHMARKS)}")
  bench.add_argument("--json", metavar="FILE", help="also write the figures to this file")
  bench.add_argument("--seconds", type=float, default=20.0, help="for which each row is measured (default: 20)")


def _bench(args: argparse.Namespace) -> None:
  from vit_jax import bench

  bench.run(args.name, json=args.json, seconds=args.seconds)
