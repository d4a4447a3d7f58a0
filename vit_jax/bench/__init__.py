"""Benchmarks: `vit-jax bench NAME` measures on this machine and prints one table; `--json=FILE` keeps the figures.

A sub-benchmark is a module with one function, `measure(budget) -> Iterator[Row]`; see `harness.py`.
"""

from __future__ import annotations

import importlib
import os

from vit_jax.bench.harness import Report

BENCHMARKS = {
  "data": "the input pipeline: decoding, host and device augmentation, waiting for data",
  "step": "the training step, beside PyTorch where it is installed",
}


def run(name: str, *, json: str | os.PathLike | None = None, seconds: float = 20.0) -> Report:
  """Runs a benchmark, prints its table and writes the figures to a file if one is named.

  Args:
    name: of BENCHMARKS.
    json: file to write.
    seconds: for which each row is measured, about.
  """
  rows = importlib.import_module(f"vit_jax.bench.{name}").measure(seconds)
  report = Report.of(name, rows)
  report.show()
  if json is not None:
    report.write(json)
  return report
