"""What a training run would do, without making it: what its config changes, what it needs, how it starts."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax.checkpoints import latest
from vit_jax.inspect import tables
from vit_jax.inspect.columns import align
from vit_jax.parallel import processes
from vit_jax.train import estimates, frozen, setup, starting
from vit_jax.train.alone import check_folder


def describe(
  config: ConfigDict,
  workdir: str,
  *,
  accept_config_change: bool = False,
  measure: bool = False,
  width: int | None = None,
) -> str:
  """What `train` would do, without writing anything.

  Args:
    config: as given, not resolved.
    workdir: of the run, which may have begun there.
    accept_config_change: as for `train`.
    measure: compile the step and make a few, to say what a run needs; else it is estimated in seconds.
    width: of a line; None: as long as it comes.

  Raises:
    UserError: where `train` would refuse.
  """
  folder = Path(workdir).expanduser().absolute()
  check_folder(folder)
  run = frozen.pin(setup.prepare(setup.grouped_as_begun(config, folder)), folder)
  setup.check_unchanged(run.config, folder, accept_change=accept_config_change)
  step = latest(folder)
  if step is not None:
    start = f"goes on from step {step} of the workdir, whatever init_from and gram.source say"
  else:
    start = starting.report(starting.open_sources(run, setup.abstract_state(run)), width=width)
  facts = [(name, str(value)) for name, value in (setup.describe(run) | {"workdir": workdir}).items()]
  facts = [(f"{name:<12}", value) for name, value in facts]
  if step is not None and step >= run.steps("duration"):
    needs = "the run is complete: there is nothing left to do"
  else:
    found = estimates.measure(run) if measure else estimates.estimate(run)
    needs = estimates.report(found, run, done=step or 0, width=width)
  environment = "\n".join(f"{name}={value}" for name, value in processes.environment().items())
  parts = [
    _changes(config, run.config, width),
    needs,
    align(facts, keep=(0,), width=width),
    start,
    f"environment\n{environment}" if environment else "",
  ]
  return "\n\n".join(part for part in parts if part)


def _changes(config: ConfigDict, resolved: ConfigDict, width: int | None) -> str:
  """The keys that differ from their defaults, then what this run makes of durations and automatic values."""
  table = tables.changes_table(config, configs.defaults_of(config), width=width)
  lines = ["changed by the run file and the command line", table or "  nothing"]
  if automatic := tables.changes_table(resolved, config, was="given as ", width=width):
    lines += ["", "what that means for these data and devices", automatic]
  return "\n".join(lines)
