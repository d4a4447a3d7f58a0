"""`vit-jax inspect …`: look at a config, a model, a mesh, a batch, features, a run or its steps."""

from __future__ import annotations

import argparse
import functools
import sys

from vit_jax.commands.common import destination, limits, line_width, load, model_table, show, writing
from vit_jax.commands.flags import (
  PICTURES,
  Commands,
  add,
  count,
  picture,
  sizes,
  with_config,
  with_limits,
  with_model,
  with_sizes,
)
from vit_jax.config.errors import UserError


def add_to(commands: Commands) -> None:
  """Their flags."""
  inspect = add(commands, "inspect", None, "look at a config, a model, a mesh, a batch, or features")
  views = inspect.add_subparsers(title="what", required=True, metavar="WHAT")
  config = with_config(add(views, "config", _inspect_config, "every key of a config, checked as a run would"))
  config.add_argument("--output", metavar="FILE", help="write to this file instead")
  model = with_config(add(views, "model", _inspect_model, "parameters, tokens and FLOPs"))
  model.add_argument("--output", metavar="FILE", help="write to this file instead")
  saved = add(views, "checkpoints", _inspect_checkpoints, "the saved steps of a run, damaged ones too")
  saved.add_argument("--workdir", required=True, help="folder of the run")
  saved.add_argument("--verify", action="store_true", help="read every array and compare it with what was saved")
  saved.add_argument("--output", metavar="FILE", help="write to this file instead")
  run = add(views, "run", _inspect_run, "the summary of a run as it is now, also while it goes on")
  run.add_argument("workdir", metavar="RUN", help="folder of the run")
  run.add_argument("--output", metavar="FILE", help="write to this file instead")
  sharding = with_config(add(views, "sharding", _inspect_sharding, "where every parameter lies on the mesh"))
  sharding.add_argument("--devices", type=count, metavar="N", help="devices, which need not be there (default: these)")
  sharding.add_argument("--output", metavar="FILE", help="write to this file instead")
  batch = with_config(add(views, "batch", _inspect_batch, "a contact sheet of crops and masks"))
  batch.add_argument(
    "--output", type=picture, metavar="FILE", default="batch.png", help="picture to write (default: batch.png)"
  )
  features = add(views, "features", _inspect_features, "principal components of patch features as colours")
  with_model(features)
  features.add_argument("--data", required=True, help="source of the images, e.g. folder:/photos")
  features.add_argument("--output", type=picture, metavar="FILE", default="features.png", help="default: features.png")
  features.add_argument("--images", type=count, default=8, help="images to show (default: 8)")
  with_sizes(features)
  with_limits(features)


def _inspect_config(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", text=True)
  config = load(args)
  from vit_jax.config import defaults_of
  from vit_jax.inspect import tables
  from vit_jax.train.checking import check

  for line in check(config):
    print(f"not checked: {line}", file=sys.stderr)
  show(tables.config_table(config, defaults_of(config), width=line_width(args.output)), output)


def _inspect_model(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", text=True)
  show(model_table(load(args), width=line_width(args.output)), output)


def _inspect_checkpoints(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", text=True)
  from vit_jax.inspect.saved_steps import saved_steps_table

  show(saved_steps_table(args.workdir, verify=args.verify, width=line_width(args.output)), output)


def _inspect_run(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", text=True)
  from vit_jax.train.summary import page

  show(page(args.workdir).rstrip("\n"), output)


def _inspect_sharding(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", text=True)
  config = load(args)
  import jax

  from vit_jax import methods, parallel
  from vit_jax.inspect.sharding import sharding_table

  mesh = parallel.abstract_mesh(config.mesh, args.devices or jax.device_count())
  init = functools.partial(methods.get(config.method).init, config)
  state = jax.eval_shape(init, jax.random.key(config.seed))
  show(sharding_table(state, mesh, zero=config.mesh.zero, width=line_width(args.output)), output)
  parallel.check_spread(state, mesh)


def _inspect_batch(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", endings=PICTURES)
  config = load(args)
  import jax

  from vit_jax.data.pipeline import make_pipeline
  from vit_jax.data.views import on_one_device
  from vit_jax.inspect import pictures
  from vit_jax.train import setup

  run = setup.prepare(config)
  sheets, variants = [], run.views.variants()
  for views in variants:
    with make_pipeline(run.source, views, batch_size=config.batch_size, seed=config.seed, workers=0) as batches:
      batch = jax.device_get(on_one_device(views)(next(batches)))
      sheets.append(pictures.contact_sheet(views.panels(batch), images=max(3, 8 // len(variants))))
  with writing(output, "--output"):
    print(f"wrote {pictures.save(pictures.stacked(sheets), output)}")


def _inspect_features(args: argparse.Namespace) -> None:
  output = destination(args.output, "--output", endings=PICTURES)
  from vit_jax import hub
  from vit_jax.data.evaluation_batches import evaluation_batches
  from vit_jax.data.sources import open_source
  from vit_jax.evaluation import check_image_size
  from vit_jax.inspect import pictures

  side, table = sizes(args)
  model, params = hub.load_model(args.model, image_size=table)
  seen = hub.load_preprocessing(args.model, channels=model.in_channels)
  if side is not None:
    check_image_size(side, model.stride, "--image_size")
  size = side or -(-seen.image_size // model.stride) * model.stride  # whole patches
  batches = evaluation_batches(
    open_source(args.data, limits=limits(args)),
    image_size=size,
    batch_size=args.images,
    max_examples=args.images,
    channels=model.in_channels,
    value_range=seen.value_range,
    crop_ratio=seen.crop_ratio,
  )
  images = [image for batch in batches for image in batch["images"][batch["valid"]]]
  if not images:
    raise UserError(f"--data={args.data}: holds no readable image")
  sheet = pictures.feature_sheet(model, params, images, mean=seen.mean, std=seen.std)
  with writing(output, "--output"):
    print(f"wrote {pictures.save(sheet, output)}")
