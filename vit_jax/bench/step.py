"""`vit-jax bench step`: the whole training step, beside the same step in PyTorch (`torch_step.py`).

Both are given images, masks and weights of the same sizes and do the same work: teacher on two global crops, student on
masked global and on local crops, two heads, Sinkhorn-Knopp, all losses, clipping, AdamW, EMA. PyTorch runs in a process
of its own, and the two take turns. Its losses with all that leads to them are one graph for `torch.compile`.

MFU (of devices whose bfloat16 peak is known) = model FLOPs of a step / (seconds x peak FLOP/s), with the FLOPs that
`vit_jax.inspect.cost` counts: matrix products of student (forward and twice that backward), teacher and heads; rows
that stochastic depth skips and recomputation do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import methods, parallel
from vit_jax.bench.harness import Part, Row, Timing, alternate, repeat
from vit_jax.bench.peer import PEER_PYTHON, Peer, find_peer, peer_python
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.data.views.multi_crop.masks import masked_patches
from vit_jax.inspect import cost
from vit_jax.inspect.chips import peak_flops
from vit_jax.train import loop
from vit_jax.train.setup import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Case:
  """One training step.

  Attributes:
    key: of `--case`.
    name: what the row is called.
    model: of the zoo.
    batch_size, global_size, local_size, local_number, prototypes, drop_path, dtype: as in a config.
    remat: what the backward pass recomputes.
    unroll: blocks per iteration of the scan.
  """

  key: str
  name: str
  model: str
  batch_size: int
  global_size: int
  local_size: int
  drop_path: float
  dtype: str
  prototypes: int
  local_number: int = 8
  remat: str = "none"
  unroll: int = 1

  def config(self) -> ConfigDict:
    """The resolved config of the run whose step this is."""
    c = configs.default()
    c.duration, c.batch_size, c.loss_group_size = "1000 steps", self.batch_size, self.batch_size
    c.model.name, c.model.drop_path, c.model.dtype = self.model, self.drop_path, self.dtype
    c.model.remat, c.model.unroll = self.remat, self.unroll
    c.dino.prototypes = c.ibot.prototypes = self.prototypes
    c.crops.global_size, c.crops.local_size, c.crops.local_number = (
      self.global_size,
      self.local_size,
      self.local_number,
    )
    c.optim.freeze_last_layer = "0 steps"
    configs.validate(c)
    return configs.resolve(c, None)


NOISE = "synthetic:noise?size=256&format=none"  # the pictures that both sides learn nothing from
_SMALL = Case("vits16-112", "ViT-S/16, 2x112 + 8x48 px, batch 8", "dinov3_vits16", 8, 112, 48, 0.0, "float32", 4096)
_LARGE = Case(
  "vitl16", "ViT-L/16 recipe, 2x224 + 8x96 px, batch 64", "vit_large", 64, 224, 96, 0.3, "bfloat16", 65536
)
CASES = {
  "cpu": (
    _SMALL,
    dataclasses.replace(_SMALL, key="vits16-112-drop", name=_SMALL.name + ", drop path 0.3", drop_path=0.3),
    dataclasses.replace(_SMALL, key="vits16-224-drop", name="ViT-S/16, 2x224 + 8x96 px, batch 8, drop path 0.3",
                        global_size=224, local_size=96, drop_path=0.3),
  ),
  "gpu": (
    dataclasses.replace(_SMALL, key="vits16-224", name="ViT-S/16, 2x224 + 8x96 px, batch 64", batch_size=64,
                        global_size=224, local_size=96, drop_path=0.1, dtype="bfloat16", prototypes=65536),
    _LARGE,
    dataclasses.replace(_LARGE, key="vitl16-unrolled", name=_LARGE.name + ", no loop over the blocks", unroll=24),
    dataclasses.replace(_LARGE, key="vitl16-recomputed", name="ViT-L/16 recipe, batch 128, blocks recomputed",
                        batch_size=128, remat="blocks"),
  ),
}  # fmt: skip


def parts() -> list[Part]:
  """The steps for this kind of device."""
  cases = CASES.get(jax.default_backend(), CASES["gpu"])
  return [Part(case.key, case.name, functools.partial(compare, case)) for case in cases]


def compare(case: Case, seconds: float) -> Iterator[Row]:
  """A row beside PyTorch compiled, on a CPU one beside PyTorch eager, too; the only row where there is no PyTorch."""
  log.info("compiling the step")
  ours = Ours(case)
  if peer_python() is None:
    timing = repeat(ours.step, seconds=seconds)
    yield Row(case.name, "step, wall", timing, note=f"{ours.note(timing)}; no PyTorch: set {PEER_PYTHON}")
    return
  for compiled in (False, True) if jax.default_backend() == "cpu" else (True,):
    log.info("starting PyTorch, %s", "compiled" if compiled else "eager")
    with peer(ours.net, case, compiled=compiled) as theirs:
      timing, other = alternate(ours.step, theirs.step, seconds=seconds, least=5)
      yield Row(case.name, "step, wall", timing, theirs.name, other, note=f"{ours.note(timing)}{theirs.memory()}")


class Ours:
  """The compiled step of a run on its first device, its state, and a batch."""

  def __init__(self, case: Case):
    config = case.config()
    method = methods.get(config.method)
    mesh = parallel.make_mesh({axis: 1 for axis in config.mesh}, jax.devices()[:1])
    views = method.views(config)
    run = Run(config, method, views, source=None, evaluation_sources=None, mesh=mesh)
    self.case, self.net = case, method.modules(config)
    self.state = loop.fresh_state(run)
    with make_pipeline(open_source(NOISE), views, batch_size=case.batch_size, seed=0, workers=0) as batches:
      self.batch = jax.device_put(next(batches), parallel.batch_sharding(mesh))
    with loop.mesh_context(mesh):
      self.compiled = loop.jitted_step(run, loop.abstract_state(run), views).lower(self.state, self.batch).compile()

  def step(self) -> None:
    self.state, metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready(metrics)

  def flops(self) -> float:
    """Of one step, for MFU."""
    case, backbone = self.case, self.net.backbone
    grid = (case.global_size // backbone.stride,) * 2
    return (
      case.batch_size
      * cost.dino_step(
        backbone,
        self.net.dino_head,
        self.net.ibot_head,
        global_size=case.global_size,
        local_size=case.local_size,
        local_number=case.local_number,
        masked=masked_patches(case.batch_size, grid, 0.5, (0.1, 0.5)) / case.batch_size,
      ).flops
    )

  def note(self, timing: Timing) -> str:
    memory = self.compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    speed = self.flops() / timing.median
    peak = peak_flops(jax.devices()[0].device_kind)
    used = "" if peak is None else f", MFU {speed / peak:.1%}"
    images = self.case.batch_size / timing.median
    return f"{images:.3g} images/s, {speed / 1e9:,.0f} GFLOP/s{used}, {held / 2**30:.2f} GiB"


def peer(net: Any, case: Case, *, compiled: bool) -> Peer:
  """PyTorch's side of a case, by `torch.compile` or eager."""
  backbone, head = net.backbone, net.dino_head
  return find_peer(
    "torch_step.py",
    {
      **{name: getattr(backbone, name) for name in ("width", "depth", "num_heads", "patch_size", "num_registers")},
      "mlp_hidden": backbone.mlp_hidden or 4 * backbone.width,
      **{name: getattr(head, name) for name in ("hidden", "bottleneck", "prototypes")},
      **{name: getattr(case, name) for name in ("drop_path", "batch_size", "dtype")},
      **{name: getattr(case, name) for name in ("global_size", "local_size", "local_number")},
      "compile": compiled,
    },
  )
