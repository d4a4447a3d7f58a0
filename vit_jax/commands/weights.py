"""`vit-jax export` and `convert`: weights in other formats."""

from __future__ import annotations

import argparse

from vit_jax.commands.common import destination
from vit_jax.commands.flags import FILES, Commands, add, with_format, with_model


def add_to(commands: Commands) -> None:
  """Their flags."""
  export = add(commands, "export", _export, "write a trained model in a format that others read")
  with_model(export)
  export.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  with_format(export)

  convert = add(commands, "convert", _convert, "write weights of any known kind in another format")
  convert.add_argument(
    "--from", dest="source", required=True, help="weights file (.pth, .safetensors), Hugging Face folder, or run"
  )
  convert.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  with_format(convert)


def _export(args: argparse.Namespace) -> None:
  from vit_jax import hub

  to = destination(args.to, "--to", folder=args.format not in FILES)
  hub.check_place(to, args.format, overwrite=args.overwrite)
  model, params = hub.load_model(args.model)
  seen = hub.load_preprocessing(args.model, channels=model.in_channels)
  hub.save_model(
    to,
    model,
    params,
    args.format,
    mean=seen.mean,
    std=seen.std,
    image_size=seen.image_size,
    value_range=seen.value_range,
    max_shard_size=args.max_shard_size,
    overwrite=args.overwrite,
  )
  print(f"wrote {to} ({args.format})")


def _convert(args: argparse.Namespace) -> None:
  args.model = args.source
  _export(args)
