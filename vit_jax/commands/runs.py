"""`vit-jax train`, `replay` and `evaluate`: what runs on all processes of a job."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax.commands.common import destination, limits, line_width, load, model_table
from vit_jax.commands.flags import (
  OVERRIDES_HELP,
  Commands,
  add,
  count,
  sizes,
  with_config,
  with_limits,
  with_model,
  with_processes,
  with_sizes,
)
from vit_jax.commands.job import in_job
from vit_jax.config.errors import UserError

if TYPE_CHECKING:
  from jax.sharding import Mesh


def add_to(commands: Commands) -> None:
  """Their flags."""
  train = with_config(add(commands, "train", _train, "train; the same command again resumes"))
  train.add_argument("--workdir", required=True, help="folder of the run: checkpoints, metrics, pictures")
  train.add_argument(
    "--dry_run", action="store_true", help="show what is changed, time, memory, steps and model; write nothing"
  )
  train.add_argument(
    "--measure", action="store_true", help="with --dry_run: compile the step and make a few, for time and memory"
  )
  train.add_argument(
    "--accept_config_change", action="store_true", help="resume although the config differs from the run's"
  )
  with_processes(train)

  again = add(commands, "replay", _replay, "make the step again at which a run gave up, and say where it goes wrong")
  again.add_argument("folder", metavar="DIR", help="WORKDIR/nonfinite/STEP, as the run that gave up said")
  again.set_defaults(config=None)  # that of the folder, with overrides
  again.epilog = OVERRIDES_HELP

  evaluate = add(commands, "evaluate", _evaluate, "score a model's frozen features on labelled images")
  with_model(evaluate)
  evaluate.add_argument("--tasks", default="knn", help="of knn, linear, joined by commas (default: knn)")
  evaluate.add_argument("--data", required=True, help="source whose labels are learned from, e.g. folder:/photos/train")
  evaluate.add_argument("--test_data", help="source that is scored (default: the other split of --data)")
  with_sizes(evaluate)
  evaluate.add_argument("--batch_size", type=count, default=64, help="images at a time (default: 64)")
  evaluate.add_argument("--max_examples", type=count, help="images of each source to use (default: all)")
  with_limits(evaluate)
  evaluate.add_argument("--json", metavar="FILE", help="also write the scores to this file, .json or .md")
  with_processes(evaluate)


def _train(args: argparse.Namespace) -> None:
  if args.measure and not args.dry_run:
    raise UserError("--measure: belongs to --dry_run; a run measures itself")
  config = load(args)
  from vit_jax.train import interrupts, loop

  if args.owns_process:
    interrupts.own_process()
  with in_job(args) as first:
    if not args.dry_run:
      loop.train(config, args.workdir, accept_config_change=args.accept_config_change)
      return
    from vit_jax.train import dry_run

    width = line_width()
    accepted = {"accept_config_change": args.accept_config_change}
    plan = dry_run.describe(config, args.workdir, **accepted, measure=args.measure, width=width)
    text = f"{plan}\n\n{model_table(config, width=width)}"
    if first:
      print(text)


def _replay(args: argparse.Namespace) -> None:
  from vit_jax.train.replay import replay

  print(replay(args.folder, args.overrides))


def _evaluate(args: argparse.Namespace) -> int:
  from vit_jax import evaluation
  from vit_jax.evaluation.report import ENDINGS

  with in_job(args) as first, _advice_of_flags():
    tasks = tuple(task.strip() for task in args.tasks.split(","))
    evaluation.check_tasks(tasks, "--tasks")
    output = destination(args.json, "--json", endings=ENDINGS) if first else None
    try:
      _score(args, tasks, output, first)
    except evaluation.Incomplete:  # said with the scores
      return 1
  return 0


def _score(args: argparse.Namespace, tasks: tuple[str, ...], output: Path | None, first: bool) -> None:
  from vit_jax import evaluation, hub, parallel

  mesh = _all_devices()
  side, table = sizes(args)
  model, params = hub.load_model(args.model, mesh=mesh, image_size=table)
  seen = hub.load_preprocessing(args.model, channels=model.in_channels)
  if side is not None:
    evaluation.check_image_size(side, model.stride, "--image_size")
  evaluation.evaluate_model(
    model,
    params,
    tasks=tasks,
    train_source=args.data,
    test_source=args.test_data,
    image_size=side or -(-seen.image_size // model.stride) * model.stride,
    batch_size=args.batch_size,
    max_examples=args.max_examples,
    mean=seen.mean,
    std=seen.std,
    value_range=seen.value_range,
    crop_ratio=seen.crop_ratio,
    limits=limits(args),
    sharding=None if mesh is None else parallel.batch_sharding(mesh),
    show=functools.partial(_show_scores, args.model) if first else None,
    output=output,
    about={"model": args.model},
  )


def _show_scores(title: str, results: Mapping[str, float], failed: Mapping[str, str]) -> None:
  import rich

  from vit_jax.evaluation.errors import reasons
  from vit_jax.evaluation.report import rich_table

  if results:
    rich.print(rich_table(results, title=title))
  for line in reasons(failed):
    print(f"vit-jax: {line}", file=sys.stderr)


@contextlib.contextmanager
def _advice_of_flags() -> Iterator[None]:
  """Where data have no labels, names the flags of `evaluate`: the keys of the config are those of a run."""
  from vit_jax.evaluation import UnlabelledError

  try:
    yield
  except UnlabelledError as error:
    raise UserError(
      f"{error.what}. Put the images of each class into a sub-folder of its own, or name labelled sources in --data "
      "and --test_data."
    ) from error


def _all_devices() -> Mesh | None:
  """The mesh of a job of several processes; a process that is alone evaluates on its first device."""
  import jax

  from vit_jax import parallel

  return parallel.make_mesh({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}) if jax.process_count() > 1 else None
