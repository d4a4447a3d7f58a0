"""The parser of the command line, and the flags that several sub-commands share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
import textwrap

from vit_jax.config.errors import UserError

FORMATS = ("safetensors", "pth", "timm", "orbax")
FILES = ("pth", "timm")  # of them, those that are one file
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".pdf")
OVERRIDES_HELP = "further flags:\n  --config.KEY=VALUE    override a key of the config, e.g. --config.batch_size=32"

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
  """Flags are never abbreviated: a shortened flag would change its meaning when a new one is added."""

  def __init__(self, **kwargs) -> None:
    super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)


class _Help(argparse.HelpFormatter):
  """Descriptions and epilogs keep their lines; longer ones go on below, where their text begins."""

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    lines = []
    for line in text.splitlines():
      below = indent + " " * re.match(r" *(--\S+ +)?", line).end()
      lines.append(
        textwrap.fill(line, width, initial_indent=indent, subsequent_indent=below, break_on_hyphens=False)
      )
    return "\n".join(lines)


def add(commands: argparse._SubParsersAction, name: str, command, summary: str) -> argparse.ArgumentParser:
  parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
  if command is not None:
    parser.set_defaults(command=command)
  return parser


def with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE.py[:ARG]",
    help="run file, or the name of one that comes with vit_jax (vit-jax config list)",
  )
  parser.epilog = OVERRIDES_HELP
  return parser


def with_processes(parser: argparse.ArgumentParser) -> None:
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


def with_workers(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workers", type=count, help="images at a time (default: one for each core)")
  parser.add_argument("--cache_dir", metavar="DIR", help="where indices are kept (default: as data.cache_dir)")


def with_limits(parser: argparse.ArgumentParser) -> None:
  for name, what in (("max_pixels", "pixels"), ("max_file_bytes", "bytes of a file")):
    parser.add_argument(f"--{name}", type=count, metavar="N", help=f"refuse images of more {what}, as data.{name}")


def count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, at least 1")
  return int(text)


def number(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, at least 0")
  return int(text)


def picture(text: str) -> str:
  if not text.lower().endswith(PICTURES):
    raise UserError(f"--output={text}: pictures are written as {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
  return text


def with_format(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--format", choices=FORMATS, default="safetensors")
  parser.add_argument(
    "--max_shard_size",
    type=_bytes,
    default="5GB",
    metavar="SIZE",
    help="a larger model becomes several files of at most this size (safetensors; default: 5GB)",
  )
  parser.add_argument(
    "--strict", action="store_true", help="refuse what others compute in another way at some image sizes"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace what is there, even if it is no export of the same format"
  )


def with_table_size(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--image_size",
    type=_size,
    metavar="HxW",
    help="pixels of the images that learned positions are for, where the file does not say it, e.g. 224x256",
  )


def with_sizes(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--image_size",
    type=_side_or_size,
    metavar="S or HxW",
    help="side of the images (default: the model's training size); as HxW: what learned positions are for, where the "
    "file does not say it",
  )


def sizes(args: argparse.Namespace) -> tuple[int | None, tuple[int, int] | None]:
  """The side of the images, and the size that learned positions are for, of `with_sizes`."""
  return (args.image_size, None) if isinstance(args.image_size, int) else (None, args.image_size)


def _size(text: str) -> tuple[int, int]:
  """Height and width that "224x256" or "224" means."""
  found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
  if not found or not int(found[1]) or (found[2] and not int(found[2])):
    raise argparse.ArgumentTypeError(f"{text!r} is no height and width in pixels such as 224x256")
  return int(found[1]), int(found[2] or found[1])


def _side_or_size(text: str) -> int | tuple[int, int]:
  """The side of images that "224" means, or the height and width that learned positions are for, as in "224x256"."""
  return count(text) if text.isdecimal() else _size(text)


def _bytes(text: str) -> int:
  """The bytes that "500MB" or "5GB" means."""
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
  return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def with_model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--model",
    required=True,
    help="weights file, exported folder, run folder or one of its steps (or RUN/students/NAME)",
  )
