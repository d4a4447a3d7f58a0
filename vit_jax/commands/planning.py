"""`vit-jax plan`: what a training step needs of hardware that is not there."""

from __future__ import annotations

import argparse
import functools
import json

from vit_jax.commands.common import destination, line_width, load, writing
from vit_jax.commands.flags import Commands, add, with_config


def add_to(commands: Commands) -> None:
  """Its flags."""
  plan = with_config(add(commands, "plan", _plan, "what a training step needs of hardware that is not there"))
  plan.add_argument(
    "--topology", required=True, metavar="NAME", help="v5p:4x4x8 (chips of a TPU slice), h100:256 (GPUs, 8 a host), …"
  )
  plan.add_argument(
    "--sweep", metavar="AXES", help="of batch, remat, mesh, joined by commas: the frontier of what fits, not one plan"
  )
  plan.add_argument(
    "--simulate", action="store_true", help="compile for simulated CPU devices, whatever compilers are installed"
  )
  plan.add_argument("--json", metavar="FILE", help="also write the plans to this file")


def _plan(args: argparse.Namespace) -> None:
  output = destination(args.json, "--json", endings=(".json",))
  config = load(args)
  from vit_jax.inspect.chips import topology
  from vit_jax.inspect.plan import frontier, report
  from vit_jax.train import planning, sweep

  where = topology(args.topology)
  if args.sweep is None:
    plans = [planning.plan(config, where, simulate=args.simulate)]
    text = report(plans[0], where.chip, width=line_width())
  else:
    one = functools.partial(planning.plan, where=where, simulate=args.simulate)
    plans = sweep.sweep(config, where, tuple(args.sweep.split(",")), one)
    text = frontier(plans, width=line_width())
  print(text)
  if output is not None:
    with writing(output, "--json"):
      output.write_text(json.dumps([plan.to_dict() for plan in plans], indent=2))
