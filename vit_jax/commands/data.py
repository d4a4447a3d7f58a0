"""`vit-jax data …`: list, scan, convert and preview."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

from vit_jax.commands.common import destination, limits, line_width, load, writing
from vit_jax.commands.flags import (
  PICTURES,
  Commands,
  add,
  count,
  number,
  picture,
  with_config,
  with_limits,
  with_workers,
)
from vit_jax.config.errors import UserError


def add_to(commands: Commands) -> None:
  """Their flags."""
  data = add(commands, "data", None, "list kinds of sources; scan, convert or preview data")
  actions = data.add_subparsers(title="what", required=True, metavar="WHAT")
  add(actions, "list", _list_sources, "kinds of sources and the embedded sets")
  look = add(actions, "scan", _scan, "what a source holds: sizes, broken files, duplicates; writes its index")
  look.add_argument("source", metavar="SOURCE", help="as data.source, or a folder")
  look.add_argument("--json", metavar="FILE", help="write everything found to this file, every broken image included")
  look.add_argument("--limit", type=count, help="look at this many images only, evenly spread (default: all)")
  look.add_argument("--channels", type=count, help="what all images should have (default: RGB, or what they have)")
  look.add_argument(
    "--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of images of more bits, as data.value_range"
  )
  look.add_argument("--index_only", action="store_true", help="write the index, open no image")
  look.add_argument("--beside", action="store_true", help="write a folder's index beside it, not into the cache")
  with_workers(look)
  with_limits(look)
  write = add(actions, "convert", _convert, "write a source as ArrayRecord shards; the same command again resumes")
  write.add_argument("source", metavar="SOURCE", help="as data.source, or a folder")
  write.add_argument("target", metavar="array_record:FOLDER", help="folder to write the shards into")
  write.add_argument("--max_side", type=count, help="shrink larger images to this longer side, as JPEG (default: keep)")
  write.add_argument("--records_per_shard", type=count, default=10_000, help="default: 10000")
  with_workers(write)
  with_limits(write)
  show = with_config(add(actions, "preview", _preview, "the crops and masks of a step, with what was drawn"))
  show.add_argument(
    "--output", type=picture, metavar="FILE", default="preview.png", help="picture to write (default: preview.png)"
  )
  show.add_argument("--images", type=count, help="images to show, of the first loss group (default: 4)")
  show.add_argument("--step", type=number, default=0, help="batch of the run to show, from 0 (default: 0)")


def _list_sources(args: argparse.Namespace) -> None:
  """Prints the kinds of sources and the embedded sets."""
  from vit_jax.config.values import EMBEDDED, SOURCES
  from vit_jax.inspect.columns import align

  width = line_width()
  print("data.source is one of:")
  print(align([(f"  {form}", meaning) for form, meaning in SOURCES.values()], keep=(0,), width=width))
  print("embedded sets, as embedded:NAME[/train|/test][?size=64&count=6000]:")
  print(align([(f"  {name}", meaning) for name, meaning in EMBEDDED.items()], keep=(0,), width=width))


def _scan(args: argparse.Namespace) -> None:
  """Prints what a source holds; writes its index."""
  from vit_jax.data import scanning
  from vit_jax.data.left_out import left_out_of
  from vit_jax.data.sources import rescan

  output = destination(args.json, "--json", endings=(".json",))
  spec = _source_spec(args.source)
  if args.beside:
    destination(f"{spec.removeprefix('folder:').rstrip('/')}.vit_jax_index", "--beside")
  source = rescan(spec, cache_dir=args.cache_dir, beside=args.beside, limits=limits(args))
  if args.index_only:
    print(f"{len(source):,} images, {source.num_classes} classes")
    if left_out := left_out_of(source):
      print(f"{left_out.total:,} left out: {left_out.text()}")
    return
  with _progress(len(source) if args.limit is None else min(len(source), args.limit), "scanning") as advance:
    found = scanning.scan(
      source,
      spec,
      workers=args.workers,
      limit=args.limit,
      channels=args.channels,
      value_range=tuple(args.value_range) if args.value_range else None,
      progress=advance,
    )
  print(found.report())
  if output is not None:
    with writing(output, "--json"):
      found.write(output)
    print(f"wrote {output}")


def _convert(args: argparse.Namespace) -> None:
  """Writes a source as ArrayRecord shards."""
  from vit_jax.data import converting
  from vit_jax.data.left_out import left_out_of
  from vit_jax.data.sources import open_source

  spec = _source_spec(args.source)
  scheme, _, folder = args.target.partition(":")
  if scheme != "array_record" or not folder or "*" in folder:
    raise UserError(f"{args.target}: must be array_record:FOLDER, the folder to write the shards into")
  folder = destination(folder, "array_record:FOLDER", folder=True)
  source = open_source(spec, cache_dir=args.cache_dir, limits=limits(args))
  with _progress(len(source), "converting") as advance:
    try:
      done = converting.convert(
        source,
        spec,
        folder,
        records_per_shard=args.records_per_shard,
        max_side=args.max_side,
        workers=args.workers,
        progress=advance,
      )
    except ValueError as error:
      raise UserError(str(error)) from error
    except OSError as error:
      raise UserError(f"{args.target}: cannot be written: {error}") from error
  print(f"{_written(done)}; {_counted(done['left_out'], 'unreadable image')} left out")
  if left_out := left_out_of(source):
    print(f"beside the images of {spec}, {left_out.total:,} left out: {left_out.text()}")
  if not done["records"]:
    raise UserError(f"{spec}: none of its images can be read; {folder}/{converting.BAD_RECORDS} says why")
  print(f"use it as --config.data.source='array_record:{folder}/*.array_record'")


def _counted(count: int, what: str) -> str:
  return f"{count:,} {what}{'' if count == 1 else 's'}"


def _written(done: dict[str, int]) -> str:
  """What a conversion did this time, and what was there before."""
  before, size = _counted(done["shards_before"], "shard"), f"{done['bytes'] / 1e9:.2f} GB"
  if done["shards_before"] == done["shards"]:
    return f"wrote nothing: {_counted(done['records'], 'image')} ({size}) in {before} were there already"
  there = f", beside {done['records_before']:,} in {before} that were there already" if done["shards_before"] else ""
  images = _counted(done["records"] - done["records_before"], "image")
  new = f"{images} in {_counted(done['shards'] - done['shards_before'], 'shard')}"
  return f"wrote {new}, read back and compared{there} ({size} in all)"


def _preview(args: argparse.Namespace) -> None:
  """Writes a sheet of the crops and masks of one step, with what was drawn for each."""
  output = destination(args.output, "--output", endings=PICTURES)
  config = load(args)
  import jax

  from vit_jax.data.classes import label_caption
  from vit_jax.data.groups import BAD, LossGroups
  from vit_jax.data.views import on_one_device
  from vit_jax.inspect import pictures
  from vit_jax.inspect.captioned import captioned_sheet
  from vit_jax.train import setup

  run = setup.prepare(config)
  size, per_batch = run.config.loss_group_size, run.config.batch_size // run.config.loss_group_size
  if args.step >= run.steps("duration"):
    raise UserError(f"--step={args.step}: the run has {run.steps('duration')} steps, from 0")
  if args.images is not None and args.images > size:
    raise UserError(f"--images={args.images}: a step is shown by its first loss group, loss_group_size={size} images")
  groups = LossGroups(run.source, run.views, run.config.seed, size, per_batch, timeout=run.config.data.timeout or None)
  first = args.step * per_batch
  views = groups.views(args.step)
  arrays = {name: array for name, array in groups[first].items() if name != BAD}
  made, rows = jax.device_get(on_one_device(views)(arrays)), []
  panels = [(panel, pictures.shown_panel(panel)) for panel in views.panels(made)]
  for i, (name, drawn) in enumerate(groups.drawn(first, args.images or 4)):
    height, width = drawn.size
    shared = f"; all crops: {', '.join(drawn.shared)}" if drawn.shared else ""
    title = f"{name}, decoded to {width} x {height}, {label_caption(run.source, made['label'][i])}{shared}"
    captions, cells = iter(drawn.captions), []
    for panel, shown in panels:
      for j, crop in enumerate(shown[i]):
        lines = [f"{panel.name} {j + 1}, {crop.shape[0]} px", *next(captions)]
        if panel.masks is not None:
          mask = panel.masks[i, j]
          lines.append(f"{mask.sum()} of {mask.size} patches masked")
        cells.append((crop, lines))
    rows.append((title, cells))
  with writing(output, "--output"):
    print(f"wrote {pictures.save(captioned_sheet(rows), output)}")


def _source_spec(text: str) -> str:
  """A source's specification; a path that exists is that of a folder or, by its ending, of a shard."""
  if os.path.exists(os.path.expanduser(text)) and not re.match(r"\w{2,}:", text):
    from vit_jax.data.hints import spec_of_path

    return spec_of_path(text)
  return text


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
  """A progress bar on the terminal: a function that advances it."""
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

  columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
  with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)
