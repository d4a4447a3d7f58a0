"""`vit-jax profile`: where the time of a training step goes."""

from __future__ import annotations

import argparse

from vit_jax.commands.common import destination, line_width, load
from vit_jax.commands.flags import Commands, add, count, with_config, with_processes
from vit_jax.commands.job import in_job


def add_to(commands: Commands) -> None:
  """Its flags."""
  profile = with_config(add(commands, "profile", _profile, "where the time of a training step goes, on this machine"))
  profile.add_argument("--workdir", required=True, help="folder to write the trace into, below profile/")
  profile.add_argument("--steps", type=count, default=5, help="to trace, after as many without it (default: 5)")
  with_processes(profile)


def _profile(args: argparse.Namespace) -> None:
  config = load(args)
  from vit_jax.inspect.profile import report
  from vit_jax.train import profiling

  with in_job(args) as first:
    destination(args.workdir, "--workdir", folder=True)  # each process writes its own trace
    found, folder = profiling.profile(config, args.workdir, steps=args.steps)
    if first:
      print(report(found, width=line_width()))
      print(f"trace: {folder} (*.trace.json.gz for ui.perfetto.dev, *.xplane.pb for XProf)")
