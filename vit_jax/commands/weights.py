"""`vit-jax export` and `convert`: weights in other formats."""

from __future__ import annotations

import argparse

from vit_jax.commands.common import destination
from vit_jax.commands.flags import FILES, Commands, add, with_format, with_model, with_table_size


def add_to(commands: Commands) -> None:
  """Their flags."""
  export = add(commands, "export", _export, "write a trained model in a format that others read")
  with_model(export)
  export.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  with_format(export)
  with_table_size(export)

  convert = add(commands, "convert", _convert, "write weights of any known kind in another format")
  convert.add_argument(
    "--from", dest="source", required=True, help="file of torch or safetensors (FILE#student: that of several in it), "
    "folder of Hugging Face or of torch.distributed.checkpoint, or run"
  )
  convert.add_argument("--to", required=True, help="folder (safetensors, orbax) or file (pth, timm) to write")
  with_format(convert)
  with_table_size(convert)


def _export(args: argparse.Namespace) -> None:
  from vit_jax import hub

  to = destination(args.to, "--to", folder=args.format not in FILES)
  hub.check_place(to, args.format, overwrite=args.overwrite)
  model, params = hub.load_model(args.model, image_size=args.image_size)
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
    preprocessor=hub.kept_preprocessor(args.model, seen),
    max_shard_size=args.max_shard_size,
    overwrite=args.overwrite,
    strict=args.strict,
  )
  print(f"wrote {to} ({args.format})\n\n{hub.how_to_load(to, model, args.format)}")


def _convert(args: argparse.Namespace) -> None:
  args.model = args.source
  _export(args)
