"""`vit-jax bench inference`: frozen features of a ViT-B/16, beside transformers and timm (`torch_inference.py`).

The same architecture on all sides (DINOv3 ViT-B/16: 4 registers, rotary positions, layer scale), random weights, whole
features of images that are on the device already. PyTorch is compiled; on a CPU, where that hardly helps, transformers
is measured eager, too.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.bench.harness import Part, Row, alternate, repeat
from vit_jax.bench.peer import PEER_PYTHON, MissingLibrary, find_peer
from vit_jax.models.zoo import create_model

log = logging.getLogger(__name__)

PEERS = (("transformers", True), ("timm", True))  # library, whether it is compiled
CPU_PEERS = (("transformers", False), *PEERS)


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of the zoo on a batch of square images; `timm` is its name there."""

  model: str = "dinov3_vitb16"
  timm: str = "vit_base_patch16_dinov3"
  image_size: int = 224
  batch_size: int = 8
  dtype: str = "float32"


def parts() -> list[Part]:
  """The model beside each peer."""
  on_cpu = jax.default_backend() == "cpu"
  case = Case() if on_cpu else Case(batch_size=256, dtype="bfloat16")
  return [
    Part(
      library if compiled else f"{library}-eager",
      f"{case.model} beside {library}, {'compiled' if compiled else 'eager'}",
      functools.partial(measure, case=case, peers=((library, compiled),)),
    )
    for library, compiled in (CPU_PEERS if on_cpu else PEERS)
  ]


def measure(seconds: float, case: Case, peers: tuple[tuple[str, bool], ...] = CPU_PEERS) -> Iterator[Row]:
  """A row beside each peer; where one is missing, its row says so."""
  ours = _ours(case)
  name = f"{case.model}, {case.image_size} px, batch {case.batch_size}, {case.dtype}"
  for library, compiled in peers:
    try:
      theirs = find_peer("torch_inference.py", ours.settings() | {"library": library, "compile": compiled})
    except MissingLibrary as error:
      theirs, why = None, str(error)
    else:
      why = f"no PyTorch: set {PEER_PYTHON}"
    if theirs is None:
      yield Row(name, "image, wall", repeat(ours.step, seconds=seconds, units=case.batch_size), note=why)
      continue
    with theirs:
      timing, other = alternate(ours.step, theirs.step, seconds=seconds, units=case.batch_size, least=5)
      yield Row(name, "image, wall", timing, theirs.name, other, note=theirs.memory().strip("; "))


@functools.lru_cache(maxsize=1)
def _ours(case: Case) -> Ours:
  log.info("compiling %s", case.model)
  return Ours(case)


class Ours:
  """The compiled forward pass, its parameters, and a batch."""

  def __init__(self, case: Case):
    self.case = case
    self.model = create_model(case.model, dtype=case.dtype, param_dtype=case.dtype)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    self.images = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), case.dtype)
    empty = jax.eval_shape(self.model.init, jax.random.key(0), self.images)
    draw = np.random.default_rng(1)
    # Drawn by numpy: compiling the random initialisation would take longer than all that is measured.
    weights = jax.tree.map(lambda x: jnp.asarray(0.02 * draw.standard_normal(x.shape, np.float32), x.dtype), empty)
    self.compiled = jax.jit(self.model.apply).lower(weights, self.images).compile()
    self.weights = weights

  def step(self) -> None:
    jax.block_until_ready(self.compiled(self.weights, self.images))

  def settings(self) -> dict[str, object]:
    """What the other side must know."""
    m = self.model
    sizes = {name: getattr(m, name) for name in ("width", "depth", "num_heads", "num_registers", "patch_size")}
    return {**sizes, "mlp_hidden": m.mlp_hidden or 4 * m.width, **dataclasses.asdict(self.case)}
