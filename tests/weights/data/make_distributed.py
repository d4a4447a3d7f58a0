"""Writes the folder distributed/ next to itself: what two processes save. Needs torch; made with 2.14.

    python make_distributed.py 0 & python make_distributed.py 1
"""

import os
import pathlib
import sys

import torch
import torch.distributed.checkpoint
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

os.chdir(pathlib.Path(__file__).parent)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": sys.argv[1], "WORLD_SIZE": "2"}
torch.distributed.init_process_group("gloo")
mesh = DeviceMesh("cpu", [0, 1])


def sharded(tensor, axis=0):
  return distribute_tensor(tensor, mesh, [Shard(axis)])


matrix = torch.arange(15.0).reshape(5, 3)
state = {
  "model": {
    "student.rows": sharded(matrix),
    "student.columns": sharded(matrix, 1),
    "student.half": sharded(torch.arange(6).bfloat16()),
    "student.one": sharded(torch.ones(1)),  # the second process has none of it
    "whole": torch.arange(4).reshape(2, 2),
    "scalar": torch.tensor(2.5),
  },
  "optimizer": {"param_groups": [{"lr": 0.1}]},
  "iteration": 9,
}
torch.distributed.checkpoint.save(state, checkpoint_id="distributed")  # a path that says nothing of the machine
torch.distributed.destroy_process_group()
