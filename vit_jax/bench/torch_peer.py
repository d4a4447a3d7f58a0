"""PyTorch's side of `peer.py`: runs one of the scripts beside it, in an environment that need not have vit_jax.

    python torch_peer.py torch_step.py

A script has `start(settings) -> (name, work)`: what it is called in the table, and one repetition of its work, which
may leave a GPU busy. It raises ImportError if what it needs is not there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would starve their neighbours

import torch  # noqa: E402


def main() -> None:
  """Reads the settings, then repeats the work as often as every further line says."""
  settings = json.loads(sys.stdin.readline())
  torch.set_num_threads(settings["threads"])
  torch.set_float32_matmul_precision("high" if settings["dtype"] == "bfloat16" else "highest")
  try:
    name, work = importlib.import_module(sys.argv[1].removesuffix(".py")).start(settings)
  except ImportError as error:
    print(json.dumps({"missing": str(error)}), flush=True)
    return
  print(json.dumps({"name": name}), flush=True)
  on_gpu = settings["device"] == "cuda"
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      start = time.perf_counter()
      work()
      if on_gpu:
        torch.cuda.synchronize()
      seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
  main()
