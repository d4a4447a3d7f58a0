"""The `vit-jax` command: one thin function a sub-command.

Everything heavy is imported inside the functions, so that `vit-jax --help` and a mistyped key answer at once. Errors
that are for the user are printed without a traceback, with exit code 2; any other exception keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vit_jax.config.errors import UserError
from vit_jax.config.fields import fields

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from ml_collections import ConfigDict

  from vit_jax.parallel.lifeline import Lifeline

_OVERRIDE = "--config."
_BENCHMARKS = ("data", "step")
_FORMATS = ("safetensors", "pth", "timm", "orbax")
_OVERRIDES_HELP = "further flags:\n  --config.KEY=VALUE    override a key of the config, e.g. --config.batch_size=32"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit code."""
  _log_to_terminal()
  try:
    args = parse(sys.argv[1:] if argv is None else argv)
    args.command(args)
  except Exception as error:
    if not _is_for_user(error):
      raise
    for line in str(error).splitlines():
      print(f"vit-jax: {line}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("vit-jax: interrupted", file=sys.stderr)
    return 130
  return 0


@contextlib.contextmanager
def _in_job(args: argparse.Namespace) -> Iterator[bool]:
  """Joins the processes of the job; gives whether this is the first of them, which speaks for all.

  Where there are several, an exception ends the process here, after the others have been told.
  """
  from vit_jax.parallel import processes

  given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id", "local_device_ids")}
  member = processes.join(processes.find(**given), timeout=args.join_timeout)
  if member is None:
    yield True
    return
  _log_as(member)
  try:
    yield member.process == 0
  except KeyboardInterrupt:
    member.fail("interrupted", 130)
  except Exception as error:
    from jax.errors import JaxRuntimeError

    if _is_for_user(error):
      member.fail(str(error), 2)
    # A computation that breaks off is mostly the end of another process, which says more.
    member.fail(traceback.format_exc(), 1, wait=3.0 if isinstance(error, JaxRuntimeError) else 0.0)
  finally:
    member.leave()


def _log_as(member: Lifeline) -> None:
  """From now on messages say of which process they are; those of progress are the first one's."""
  for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter(f"{member.name}: %(message)s" if member.process else "%(message)s"))
  if member.process:
    logging.getLogger("vit_jax").setLevel(logging.WARNING)


def _is_for_user(error: Exception) -> bool:
  """Whether an error's message tells the user what to put right.

  So do the exceptions that vit_jax defines, and a ValueError or ImportError that opens with a key of the config: most
  rooms know nothing of `vit_jax.config` and name the key in a plain one.
  """
  if isinstance(error, UserError) or type(error).__module__.partition(".")[0] == "vit_jax":
    return True
  return isinstance(error, ValueError | ImportError) and re.split(r"[=:\s]", str(error), maxsplit=1)[0] in fields()


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The parsed command line: `command` is the function to call with it, `overrides` its `--config.…` flags.

  Raises:
    UserError: for an override without a value, or of a sub-command that takes no config.
    SystemExit: by argparse, for `--help` (0) and wrong usage (2).
  """
  rest, overrides = _split_overrides(argv)
  args = _parser().parse_args(rest)
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


def _train(args: argparse.Namespace) -> None:
  config = _load(args)
  from vit_jax.train import loop

  with _in_job(args) as first:
    if not args.dry_run:
      loop.train(config, args.workdir, accept_config_change=args.accept_config_change)
      return
    text = f"{loop.describe(config, args.workdir)}\n\n{_model_table(config)}"
    if first:
      print(text)


def _replay(args: argparse.Namespace) -> None:
  from vit_jax.train.replay import replay

  print(replay(args.folder, args.overrides))


def _evaluate(args: argparse.Namespace) -> None:
  import rich

  from vit_jax import evaluation, hub, parallel
  from vit_jax.evaluation.report import rich_table

  with _in_job(args) as first:
    mesh = _all_devices()
    model, params = hub.load_model(args.model, mesh=mesh)
    seen = hub.load_preprocessing(args.model, channels=model.in_channels)
    scores = evaluation.evaluate_model(
      model,
      params,
      tasks=tuple(args.tasks.split(",")),
      train_source=args.data,
      test_source=args.test_data,
      image_size=args.image_size or seen.image_size,
      batch_size=args.batch_size,
      max_examples=args.max_examples,
      mean=seen.mean,
      std=seen.std,
      sharding=None if mesh is None else parallel.batch_sharding(mesh),
      output=args.json if first else None,
      about={"model": args.model},
    )
    if first:
      rich.print(rich_table(scores, title=args.model))


def _all_devices() -> Mesh | None:
  """The mesh of a job of several processes; a process that is alone evaluates on its first device."""
  import jax

  from vit_jax import parallel

  return parallel.make_mesh({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}) if jax.process_count() > 1 else None


def _export(args: argparse.Namespace) -> None:
  from vit_jax import hub

  model, params = hub.load_model(args.model)
  seen = hub.load_preprocessing(args.model, channels=model.in_channels)
  hub.save_model(
    args.to,
    model,
    params,
    args.format,
    mean=seen.mean,
    std=seen.std,
    image_size=seen.image_size,
    max_shard_size=args.max_shard_size,
  )
  print(f"wrote {args.to} ({args.format})")


def _convert(args: argparse.Namespace) -> None:
  args.model = args.source
  _export(args)


def _plan(args: argparse.Namespace) -> None:
  config = _load(args)
  from vit_jax.inspect.chips import topology
  from vit_jax.inspect.plan import frontier, report
  from vit_jax.train import planning, sweep

  where = topology(args.topology)
  if args.sweep is None:
    plans = [planning.plan(config, where, simulate=args.simulate)]
    text = report(plans[0], where.chip)
  else:
    one = functools.partial(planning.plan, where=where, simulate=args.simulate)
    plans = sweep.sweep(config, where, tuple(args.sweep.split(",")), one)
    text = frontier(plans)
  if args.json is not None:
    with open(args.json, "w") as file:
      json.dump([plan.to_dict() for plan in plans], file, indent=2)
  print(text)


def _inspect_config(args: argparse.Namespace) -> None:
  config = _load(args)
  from vit_jax.config import defaults_of
  from vit_jax.inspect import tables

  _show(tables.config_table(config, defaults_of(config)), args.output)


def _inspect_model(args: argparse.Namespace) -> None:
  _show(_model_table(_load(args)), args.output)


def _inspect_checkpoints(args: argparse.Namespace) -> None:
  from vit_jax.inspect.saved_steps import saved_steps_table

  _show(saved_steps_table(args.workdir, verify=args.verify), args.output)


def _inspect_sharding(args: argparse.Namespace) -> None:
  config = _load(args)
  import functools

  import jax

  from vit_jax import methods, parallel
  from vit_jax.inspect.sharding import sharding_table

  mesh = parallel.abstract_mesh(config.mesh, args.devices or jax.device_count())
  init = functools.partial(methods.get(config.method).init, config)
  state = jax.eval_shape(init, jax.random.key(config.seed))
  _show(sharding_table(state, mesh, zero=config.mesh.zero), args.output)
  parallel.check_spread(state, mesh)


def _inspect_batch(args: argparse.Namespace) -> None:
  config = _load(args)
  import jax

  from vit_jax.data.device import one_device
  from vit_jax.data.pipeline import make_pipeline
  from vit_jax.inspect import pictures
  from vit_jax.train import setup

  run = setup.prepare(config)
  sheets, variants = [], run.views.variants()
  for views in variants:
    with make_pipeline(run.source, views, batch_size=config.batch_size, seed=config.seed, workers=0) as batches:
      batch = jax.device_get(one_device(views)(next(batches)))
      sheets.append(pictures.contact_sheet(batch, images=max(3, 8 // len(variants))))
  print(f"wrote {pictures.save(pictures.stacked(sheets), args.output)}")


def _inspect_features(args: argparse.Namespace) -> None:
  from vit_jax import hub
  from vit_jax.data.evaluation_batches import evaluation_batches
  from vit_jax.data.sources import open_source
  from vit_jax.inspect import pictures

  model, params = hub.load_model(args.model)
  seen = hub.load_preprocessing(args.model, channels=model.in_channels)
  size = -(-(args.image_size or seen.image_size) // model.stride) * model.stride  # whole patches
  batches = evaluation_batches(
    open_source(args.data), image_size=size, batch_size=args.images, max_examples=args.images
  )
  images = [image for batch in batches for image in batch["images"][batch["valid"]]]
  if not images:
    raise UserError(f"--data={args.data}: holds no readable image")
  print(
    f"wrote {pictures.save(pictures.feature_sheet(model, params, images, mean=seen.mean, std=seen.std), args.output)}"
  )


def _data_list(args: argparse.Namespace) -> None:
  from vit_jax import data_commands

  data_commands.list_sources(args)


def _data_scan(args: argparse.Namespace) -> None:
  from vit_jax import data_commands

  data_commands.scan(args)


def _data_convert(args: argparse.Namespace) -> None:
  from vit_jax import data_commands

  data_commands.convert(args)


def _data_preview(args: argparse.Namespace) -> None:
  config = _load(args)
  from vit_jax import data_commands

  data_commands.preview(args, config)


def _bench(args: argparse.Namespace) -> None:
  from vit_jax import bench

  bench.run(args.name, json=args.json, seconds=args.seconds)


def _load(args: argparse.Namespace) -> ConfigDict:
  """The validated config of a command line."""
  from vit_jax import config

  loaded = config.load(args.config, args.overrides)
  config.validate(loaded)
  return loaded


def _model_table(config: ConfigDict) -> str:
  """Parameters, tokens and FLOPs of what a config trains."""
  from vit_jax import methods
  from vit_jax.config import loss_group_size
  from vit_jax.data.masks import masked_patches
  from vit_jax.inspect import tables
  from vit_jax.methods import gram

  method = methods.get(config.method)
  views, group = method.views(config), loss_group_size(config)
  masked = [masked_patches(group, v.mask_grid, v.mask_probability, v.mask_ratio) / group for v in views.variants()]
  frozen, parts = methods.frozen_teacher(config), []
  for name, alone in methods.each_student(config).items():
    anchored = gram.has_own_pass(alone, distilling=frozen is not None)
    table = tables.training_table(
      method.modules(alone), views, masked=masked, own_teacher=frozen is None, gram_teacher=anchored
    )
    parts.append(f"student {name}\n\n{table}" if name else table)
  if frozen is not None:
    sizes = [("global crop", v.mask_grid[0] * frozen.modules.backbone.stride) for v in views.variants()]
    heads = {"dino_head": frozen.modules.dino_head, "ibot_head": frozen.modules.ibot_head}
    table = tables.model_table(frozen.modules.backbone, image_sizes=sizes, heads=heads)
    parts.append(f"frozen teacher {frozen.address}\n\n{table}")
  return "\n\n".join(parts)


def _log_to_terminal() -> None:
  """Shows what vit_jax says of its progress, and only warnings of the libraries beneath it.

  Comes before any library is imported: the first to set up logging decides its form.
  """
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("vit_jax").setLevel(logging.INFO)


def _show(text: str, output: str | None) -> None:
  if output is None:
    print(text)
    return
  with open(output, "w") as file:
    file.write(text + "\n")
  print(f"wrote {output}")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="vit-jax", description="Vision Transformers in JAX: DINOv3 self-supervised pretraining.")
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

  train = _with_config(_add(commands, "train", _train, "train; the same command again resumes"))
  train.add_argument("--workdir", required=True, help="folder of the run: checkpoints, metrics, pictures")
  train.add_argument("--dry_run", action="store_true", help="show config, steps, model and mesh; train nothing")
  train.add_argument(
    "--accept_config_change", action="store_true", help="resume although the config differs from the run's"
  )
  _with_processes(train)

  again = _add(commands, "replay", _replay, "make the step again at which a run gave up, and say where it goes wrong")
  again.add_argument("folder", metavar="DIR", help="WORKDIR/nonfinite/STEP, as the run that gave up said")
  again.set_defaults(config=None)  # that of the folder, with overrides
  again.epilog = _OVERRIDES_HELP

  evaluate = _add(commands, "evaluate", _evaluate, "score a model's frozen features on labelled images")
  _with_model(evaluate)
  evaluate.add_argument("--tasks", default="knn", help="of knn, linear, joined by commas (default: knn)")
  evaluate.add_argument("--data", required=True, help="source whose labels are learned from, e.g. folder:/photos/train")
  evaluate.add_argument("--test_data", help="source that is scored (default: the other split of --data)")
  evaluate.add_argument("--image_size", type=int, help="side of the images (default: the model's training size)")
  evaluate.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
  evaluate.add_argument("--max_examples", type=int, help="images of each source to use (default: all)")
  evaluate.add_argument("--json", metavar="FILE", help="also write the scores to this file, .json or .md")
  _with_processes(evaluate)

  export = _add(commands, "export", _export, "write a trained model in a format that others read")
  _with_model(export)
  export.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  _with_format(export)

  convert = _add(commands, "convert", _convert, "write weights of any known kind in another format")
  convert.add_argument(
    "--from", dest="source", required=True, help="weights file (.pth, .safetensors), Hugging Face folder, or run"
  )
  convert.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  _with_format(convert)

  plan = _with_config(_add(commands, "plan", _plan, "what a training step needs of hardware that is not there"))
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

  inspect = _add(commands, "inspect", None, "look at a config, a model, a mesh, a batch, or features")
  views = inspect.add_subparsers(title="what", required=True, metavar="WHAT")
  config = _with_config(_add(views, "config", _inspect_config, "the resolved config"))
  config.add_argument("--output", metavar="FILE", help="write to this file instead")
  model = _with_config(_add(views, "model", _inspect_model, "parameters, tokens and FLOPs"))
  model.add_argument("--output", metavar="FILE", help="write to this file instead")
  saved = _add(views, "checkpoints", _inspect_checkpoints, "the saved steps of a run, damaged ones too")
  saved.add_argument("--workdir", required=True, help="folder of the run")
  saved.add_argument("--verify", action="store_true", help="read every array and compare it with what was saved")
  saved.add_argument("--output", metavar="FILE", help="write to this file instead")
  sharding = _with_config(_add(views, "sharding", _inspect_sharding, "where every parameter lies on the mesh"))
  sharding.add_argument("--devices", type=int, metavar="N", help="devices, which need not be there (default: these)")
  sharding.add_argument("--output", metavar="FILE", help="write to this file instead")
  batch = _with_config(_add(views, "batch", _inspect_batch, "a contact sheet of crops and masks"))
  batch.add_argument("--output", metavar="FILE", default="batch.png", help="picture to write (default: batch.png)")
  features = _add(views, "features", _inspect_features, "principal components of patch features as colours")
  _with_model(features)
  features.add_argument("--data", required=True, help="source of the images, e.g. folder:/photos")
  features.add_argument("--output", metavar="FILE", default="features.png", help="default: features.png")
  features.add_argument("--images", type=int, default=8, help="images to show (default: 8)")
  features.add_argument("--image_size", type=int, help="side of the images (default: the model's training size)")

  bench = _add(
    commands, "bench", _bench, "measure the speed of a part on this machine, beside a peer where there is one"
  )
  bench.add_argument("name", metavar="NAME", choices=_BENCHMARKS, help=f"of {', '.join(_BENCHMARKS)}")
  bench.add_argument("--json", metavar="FILE", help="also write the figures to this file")
  bench.add_argument("--seconds", type=float, default=20.0, help="for which each row is measured (default: 20)")

  data = _add(commands, "data", None, "list kinds of sources; scan, convert or preview data")
  actions = data.add_subparsers(title="what", required=True, metavar="WHAT")
  _add(actions, "list", _data_list, "kinds of sources and the embedded sets")
  look = _add(actions, "scan", _data_scan, "what a source holds: sizes, broken files, duplicates; writes its index")
  look.add_argument("source", metavar="SOURCE", help="as data.source, or a folder")
  look.add_argument("--json", metavar="FILE", help="write everything found to this file, every broken image included")
  look.add_argument("--limit", type=_count, help="look at this many images only, evenly spread (default: all)")
  look.add_argument("--index_only", action="store_true", help="write the index, open no image")
  look.add_argument("--beside", action="store_true", help="write a folder's index beside it, not into the cache")
  _with_workers(look)
  write = _add(
    actions, "convert", _data_convert, "write a source as ArrayRecord shards; the same command again resumes"
  )
  write.add_argument("source", metavar="SOURCE", help="as data.source, or a folder")
  write.add_argument("target", metavar="array_record:FOLDER", help="folder to write the shards into")
  write.add_argument(
    "--max_side", type=_count, help="shrink larger images to this longer side, as JPEG (default: keep)"
  )
  write.add_argument("--records_per_shard", type=_count, default=10_000, help="default: 10000")
  _with_workers(write)
  show = _with_config(_add(actions, "preview", _data_preview, "the crops and masks of a step, with what was drawn"))
  show.add_argument("--output", metavar="FILE", default="preview.png", help="picture to write (default: preview.png)")
  show.add_argument("--images", type=_count, default=4, help="images to show (default: 4)")
  show.add_argument("--step", type=int, default=0, help="batch of the run to show, from 0 (default: 0)")
  return parser


class _Parser(argparse.ArgumentParser):
  """Flags are never abbreviated: a shortened flag would change its meaning when a new one is added."""

  def __init__(self, **kwargs) -> None:
    super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def _add(commands: argparse._SubParsersAction, name: str, command, summary: str) -> argparse.ArgumentParser:
  parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
  if command is not None:
    parser.set_defaults(command=command)
  return parser


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
  parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="run file, e.g. configs/quickstart.py")
  parser.epilog = _OVERRIDES_HELP
  return parser


def _with_processes(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group(
    "several processes", "Only where no launcher says it: Slurm, Open MPI, GKE, Cloud TPU or the JAX_ variables."
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, with a free port")
  group.add_argument("--num_processes", type=int, metavar="N", help="processes of the job")
  group.add_argument("--process_id", type=int, metavar="I", help="this process, from 0")
  group.add_argument(
    "--local_device_ids",
    type=_integers,
    metavar="0,1",
    help="GPUs of this process (default: its share of the machine's)",
  )
  group.add_argument(
    "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="wait so long for the others (default: 300)"
  )


def _integers(text: str) -> list[int]:
  return [int(part) for part in text.split(",")]


def _with_workers(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workers", type=_count, help="images at a time (default: one for each core)")
  parser.add_argument("--cache_dir", metavar="DIR", help="where indices are kept (default: as data.cache_dir)")


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, at least 1")
  return int(text)


def _with_format(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--format", choices=_FORMATS, default="safetensors")
  parser.add_argument(
    "--max_shard_size",
    type=_bytes,
    default="5GB",
    metavar="SIZE",
    help="a larger model becomes several files of at most this size (safetensors; default: 5GB)",
  )


def _bytes(text: str) -> int:
  """The bytes that "500MB" or "5GB" means."""
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
  return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _with_model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--model",
    required=True,
    help="weights file, exported folder, run folder or one of its steps (or RUN/students/NAME)",
  )
