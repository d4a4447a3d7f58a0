"""Benchmarks: `vit-jax bench NAME` measures on this machine and prints its rows; `--json=FILE` keeps the figures.

A benchmark is a module with a function `parts() -> Sequence[Part]`: what can be asked for by name, and how its rows are
measured; see `harness.py`. Every row is printed, and kept in the file, as soon as it is measured.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Collection, Sequence

from vit_jax.bench.harness import Part, Report, Row

log = logging.getLogger(__name__)

BENCHMARKS = {
  "attention": "attention, beside JAX's own and PyTorch's",
  "data": "the input pipeline: decoding, host and device augmentation, waiting for data",
  "inference": "frozen features of a ViT-B/16, beside transformers and timm where they are installed",
  "knn": "the neighbours of the k-NN protocol, beside PyTorch where it is installed",
  "startup": "from launching a training run to its first step, with and without compiled programs",
  "step": "the training step, beside PyTorch where it is installed",
}
_DEVICES_AT_THE_END = {"startup"}  # until then they are left to the runs that it starts


class UnknownCase(ValueError):
  """A benchmark has no case of that name."""


def parts(name: str, wanted: Collection[str] = ()) -> list[Part]:
  """The cases of a benchmark on this kind of device, all or those that are named.

  Raises:
    UnknownCase: naming the nearest.
  """
  # Two frameworks share the accelerator: neither may take its memory beforehand.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  found: Sequence[Part] = importlib.import_module(f"vit_jax.bench.{name}").parts()
  known = {part.name: part for part in found}
  for case in wanted:
    if case not in known:
      from vit_jax.config.fields import did_you_mean

      raise UnknownCase(
        f"--case={case}: bench {name} has no such case here{did_you_mean(case, known)}; there are {', '.join(known)}"
      )
  return [part for part in found if not wanted or part.name in wanted]


def run(
  name: str, *, json: str | os.PathLike | None = None, seconds: float = 20.0, cases: Collection[str] = ()
) -> Report:
  """Runs a benchmark, prints its rows as they come and writes the figures to a file.

  What is measured when it is interrupted, or when a case fails, is kept.

  Args:
    name: of BENCHMARKS.
    json: file to write, anew after every row.
    seconds: for which each row is measured, about.
    cases: names of cases; none: all.

  Raises:
    UnknownCase: before anything is measured.
    OSError: at the end, if the file could not be written.
  """
  chosen, rows, failed = parts(name, cases), [], None
  report = Report.of(name, (), devices=name not in _DEVICES_AT_THE_END)
  print(report.title(), flush=True)
  try:
    for number, part in enumerate(chosen, 1):
      log.info("case %d of %d, %s: %s", number, len(chosen), part.name, part.what)
      for row in part.measure(seconds):
        rows.append(row)
        print(row.text(), flush=True)
        failed = _keep(report.with_rows(rows), json) or failed
  finally:
    if rows:
      report = Report.of(name, rows, load=report.machine["load_at_start"])
      failed = _keep(report, json, last=True)
    if json is not None and not failed:
      log.info("%d row%s written to %s", len(rows), "" if len(rows) == 1 else "s", json)
  if failed:
    raise failed
  return report


def _keep(report: Report, path: str | os.PathLike | None, *, last: bool = False) -> OSError | None:
  """Writes a report, unless nothing is asked for; measuring goes on where that fails."""
  if path is None or not (last or report.replaces(path)):
    return None
  try:
    report.write(path)
  except OSError as error:
    log.warning("%s: cannot be written (%s); what is measured is printed here", path, error.strerror)
    return error
  return None


__all__ = ["BENCHMARKS", "Part", "Report", "Row", "UnknownCase", "parts", "run"]
