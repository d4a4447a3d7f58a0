"""Single operations in PyTorch, the peers of `vit-jax bench attention` and `bench knn`; `torch_peer.py` runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

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


def start(s: dict) -> tuple[str, Callable[[], None]]:
  """For `torch_peer.py`."""
  once = {"attention": attention, "knn": knn}[s["what"]](s)

  def calls() -> None:
    for _ in range(s["calls"]):
      once()

  return f"PyTorch {torch.__version__}", calls
