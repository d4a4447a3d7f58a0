"""What several sub-commands do: read their config, show a text, describe a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from vit_jax.data.limits import Limits


def load(args: argparse.Namespace) -> ConfigDict:
  """The validated config of a command line."""
  from vit_jax import config

  loaded = config.load(args.config, args.overrides)
  config.validate(loaded)
  return loaded


def limits(args: argparse.Namespace) -> Limits:
  """The bounds on images of a command with the flags of `with_limits`."""
  from vit_jax.data.limits import DEFAULT, Limits

  return Limits(args.max_pixels or DEFAULT.max_pixels, args.max_file_bytes or DEFAULT.max_file_bytes)


def line_width(output: str | None = None) -> int | None:
  """Characters of a line where a text is shown: of the terminal; None: it goes to a file or into a pipe."""
  from vit_jax.inspect.columns import terminal_width

  return None if output is not None else terminal_width()


def model_table(config: ConfigDict, *, width: int | None = None) -> str:
  """Parameters, tokens and FLOPs of what a config trains; `width` as in `inspect.columns.align`."""
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
      method.modules(alone), views, masked=masked, own_teacher=frozen is None, gram_teacher=anchored, width=width
    )
    parts.append(f"student {name}\n\n{table}" if name else table)
  if frozen is not None:
    sizes = [("global crop", v.mask_grid[0] * frozen.modules.backbone.stride) for v in views.variants()]
    heads = {"dino_head": frozen.modules.dino_head, "ibot_head": frozen.modules.ibot_head}
    table = tables.model_table(frozen.modules.backbone, image_sizes=sizes, heads=heads, width=width)
    parts.append(f"frozen teacher {frozen.address}\n\n{table}")
  return "\n\n".join(parts)


def show(text: str, output: str | None) -> None:
  if output is None:
    print(text)
    return
  with open(output, "w") as file:
    file.write(text + "\n")
  print(f"wrote {output}")
