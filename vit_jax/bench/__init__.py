"""Benchmarks: `vit-jax bench NAME` measures on this machine and prints one table; `--json=FILE` keeps the figures.

A sub-benchmark is a module with one function, `measure(budget) -> Iterator[Row]`; see `harness.py`.
"""

from __future__ import annotations

import importlib
import os

from vit_jax.bench.harness import Report

BENCHMARKS = {
  "attention": "attention, beside JAX's own and PyTorch's",
  "data": "the input pipeline: decoding, host and device augmentation, waiting for data",
  "inference": "frozen features of a ViT-B/16, beside transformers and timm where they are installed",
  "knn": "the neighbours of the k-NN protocol, beside PyTorch where it is installed",
  "startup": "from launching a training run to its first step, with and without compiled programs",
  "step": "the training step, beside PyTorch where it is installed",
}


def run(name: str, *, json: str | os.PathLike | None = None, seconds: float = 20.0) -> Report:
  """Runs a benchmark, prints its table and writes the figures to a file if one is named.

  Args:
    name: of BENCHMARKS.
    json: file to write.
    seconds: for which each row is measured, about.
  """
  # Two frameworks share the accelerator: neither may take its memory beforehand.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  rows = importlib.import_module(f"vit_jax.bench.{name}").measure(seconds)
  report = Report.of(name, rows)
  report.show()
  if json is not None:
    report.write(json)
  return report
