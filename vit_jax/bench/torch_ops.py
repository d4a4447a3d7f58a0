"""Single operations in PyTorch, the peers of `vit-jax bench attention` and `bench knn`; it speaks with `peer.py`.

It imports nothing of vit_jax, so that it also runs in an environment of its own that has PyTorch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would starve their neighbours

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

_CHUNK = 1024  # queries compared at a time


def attention(s: dict) -> Callable[[], None]:
  """scaled_dot_product_attention on the layout that a fused map for q, k and v gives."""
  shape, dtype = (s["batch"], s["tokens"], s["heads"], s["head_dim"]), getattr(torch, s["dtype"])
  make = lambda: torch.randn(shape, device=s["device"], dtype=dtype).transpose(1, 2)  # noqa: E731
  *qkv, gradient = (make() for _ in range(4))

  def forward() -> None:
    with torch.inference_mode():
      F.scaled_dot_product_attention(*qkv)

  def both() -> None:
    leaves = [x.detach().requires_grad_() for x in qkv]
    torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, gradient)

  return both if s["backward"] else forward


def knn(s: dict) -> Callable[[], None]:
  """Normalised features, one matrix product and one topk for each chunk of queries."""
  keys, queries = (torch.randn(s[name], s["width"], device=s["device"]) for name in ("keys", "queries"))

  def neighbours() -> None:
    with torch.inference_mode():
      reference = F.normalize(keys).T
      for chunk in F.normalize(queries).split(_CHUNK):
        (chunk @ reference).topk(s["k"], dim=1)

  return neighbours


def main() -> None:
  s = json.loads(sys.stdin.readline())
  torch.set_num_threads(s["threads"])
  torch.set_float32_matmul_precision("highest")
  work = {"attention": attention, "knn": knn}[s["what"]](s)
  print(json.dumps({"name": f"PyTorch {torch.__version__}"}), flush=True)
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      start = time.perf_counter()
      for _ in range(s["calls"]):
        work()
      if s["device"] == "cuda":
        torch.cuda.synchronize()
      seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak_bytes": None}), flush=True)


if __name__ == "__main__":
  main()
