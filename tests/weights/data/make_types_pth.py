"""Writes types.pth, the PyTorch file of the tests, next to itself. Needs torch; the file was made with 2.13."""

import collections
import pathlib

import torch

TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")

base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
content = {
  "types": collections.OrderedDict((name, torch.tensor([0, 1, 2], dtype=getattr(torch, name))) for name in TYPES),
  "transposed": base.T,
  "row": base[1],  # shares its storage with the one before
  "scalar": torch.tensor(2.5),
  "empty": torch.zeros(0, 4),
  "parameter": torch.nn.Parameter(torch.ones(2)),
  "module": torch.nn.Linear(2, 1).requires_grad_(False).eval().state_dict(),  # carries torch's _metadata
  "plain": {"step": 3, "names": ["a", "b"], "nothing": None, "size": torch.Size((1, 2))},
}
for name, value in (("weight", [[0.5, -1.0]]), ("bias", [0.25])):
  content["module"][name] = torch.tensor(value)
torch.save(content, pathlib.Path(__file__).parent / "types.pth")
