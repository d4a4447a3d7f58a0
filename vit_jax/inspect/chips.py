"""Accelerators and the slices of them that a run can be planned for, with the figures of their makers' data sheets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vit_jax.inspect.errors import PlanError

_G, _T, _GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True)
class Gpu:
  """What XLA wants to know of a GPU to compile for it: NVIDIA's architecture white papers.

  Attributes:
    name: as the driver calls it.
    capability: compute capability.
    cores: streaming multiprocessors.
    clock: GHz, boost.
    l2: bytes.
    shared: bytes of shared memory per multiprocessor; a block may have 1 KiB less.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  clock: float
  l2: int
  shared: int


@dataclass(frozen=True)
class Chip:
  """One accelerator as JAX counts devices (half a chip where a chip is two devices).

  Attributes:
    name: of `--topology`.
    hbm: bytes of its memory.
    flops: bfloat16 operations per second, dense, peak.
    bandwidth: bytes per second of its memory.
    link: bytes per second that it can send over its fast links, all of them together (half of a "bidirectional"
      figure).
    source: whose figures these are.
    per_host: devices of a host.
    dimensions: of the torus of a TPU slice; 0: GPUs, all connected within a host.
    network: bytes per second that it can send to other hosts.
    devices: JAX devices of one chip.
    gpu: more of a GPU.
  """

  name: str
  hbm: int
  flops: float
  bandwidth: float
  link: float
  source: str
  per_host: int
  dimensions: int = 0
  network: float = 0.0
  devices: int = 1
  gpu: Gpu | None = None


def _tpu(name: str, hbm: float, tflops: float, bandwidth: float, bidirectional: float, dims: int, **more) -> Chip:
  page = "TPU7x" if name == "tpu7x" else f"TPU {name}"
  source = f"Google Cloud, TPU documentation, page '{page}'"
  link = bidirectional / 2 * _G
  return Chip(name, int(hbm * _GIB), tflops * _T, bandwidth * _G, link, source, per_host=4, dimensions=dims, **more)


def _gpu(name: str, hbm: float, tflops: float, bandwidth: float, nvlink: float, nic: float, gpu: Gpu) -> Chip:
  source = f"NVIDIA, data sheet of the {gpu.name}; a network card of {nic:.0f} Gb/s for each GPU is assumed"
  common = {"source": source, "per_host": 8, "network": nic / 8 * _G, "gpu": gpu}
  return Chip(name, int(hbm * _G), tflops * _T, bandwidth * _G, nvlink / 2 * _G, **common)


_MIB = 2**20
_CHIPS = (
  _tpu("v4", 32, 275, 1200, 600, 3),
  _tpu("v5e", 16, 197, 819, 400, 2),
  _tpu("v5p", 95.74, 459, 2765, 1200, 3),  # documented as 95 GiB; what its compiler has to give away
  _tpu("v6e", 32, 918, 1600, 800, 2),
  _tpu("tpu7x", 192 / 2, 2307 / 2, 7380 / 2, 1200 / 2, 3, devices=2),
  _gpu("a100", 80, 312, 2039, 600, 200, Gpu("A100 SXM 80GB", (8, 0), 108, 1.41, 40 * _MIB, 164 * 1024)),
  _gpu("h100", 80, 989, 3350, 900, 400, Gpu("H100 SXM 80GB", (9, 0), 132, 1.98, 50 * _MIB, 228 * 1024)),
  _gpu("h200", 141, 989, 4800, 900, 400, Gpu("H200 SXM 141GB", (9, 0), 132, 1.98, 50 * _MIB, 228 * 1024)),
  _gpu("b200", 180, 2250, 8000, 1800, 400, Gpu("HGX B200 180GB", (10, 0), 148, 1.965, 126 * _MIB, 228 * 1024)),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
_TPU_KINDS = {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device_kind: str) -> float | None:
  """The bfloat16 peak of a device by what `jax.Device.device_kind` says, "NVIDIA H100 80GB HBM3"; None: not known."""
  words = _TPU_KINDS.get(device_kind, device_kind).lower().replace("-", " ").split()
  return next((chip.flops for name, chip in CHIPS.items() if name in words), None)


@dataclass(frozen=True)
class Topology:
  """Some accelerators that are connected.

  Attributes:
    name: as the user gave it, "v5p:4x4x8" or "h100:256".
    chip: each of them.
    shape: chips along each axis of the torus; of GPUs their number.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    return math.prod(self.shape) * self.chip.devices


def topology(name: str) -> Topology:
  """The topology of a name such as "v5p:4x4x8" (chips of a slice) or "h100:256" (number of GPUs, 8 a host).

  Raises:
    PlanError: that lists the known ones.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.strip().lower())
  chip = CHIPS.get(found[1]) if found else None
  if chip is None:
    raise PlanError(f"--topology={name}: is none of the known ones:\n{known()}")
  shape = tuple(int(size) for size in found[2].split("x"))
  if len(shape) != max(chip.dimensions, 1) or 0 in shape:
    raise PlanError(f"--topology={name}: write it as {_example(chip)}. The known ones:\n{known()}")
  if chip.gpu and shape[0] > chip.per_host and shape[0] % chip.per_host:
    raise PlanError(f"--topology={name}: more than {chip.per_host} GPUs are whole hosts of {chip.per_host}")
  return Topology(name, chip, shape)


def _example(chip: Chip) -> str:
  return f"{chip.name}:" + {0: "256", 2: "16x16", 3: "4x4x8"}[chip.dimensions]


def known() -> str:
  """The chips there are, with their figures: one a line."""
  lines = []
  for chip in CHIPS.values():
    lines.append(
      f"  {_example(chip):<13} {chip.hbm / _GIB:6.1f} GiB  {chip.flops / _T:5.0f} TFLOP/s bfloat16  "
      f"{chip.bandwidth / _G:5.0f} GB/s memory  {chip.link / _G:4.0f} GB/s links"
      + (f"  {chip.network / _G:.0f} GB/s network" if chip.gpu else "")
      + (f"  ({chip.devices} devices a chip, figures of one)" if chip.devices > 1 else "")
    )
  return "\n".join(lines)


def target_config(chip: Chip) -> str:
  """The description of a GPU that XLA's compiler takes in place of the GPU (a GpuTargetConfigProto as text)."""
  gpu = chip.gpu
  # The versions of CUDA and cuDNN decide what XLA calls: without them, no 8-bit products.
  limit = 1024  # threads of a block, the same for every generation, as are the other plain numbers
  return f"""
    gpu_device_info {{
      threads_per_block_limit: {limit} threads_per_warp: 32 threads_per_core_limit: {2 * limit}
      shared_memory_per_block: {48 * 1024} shared_memory_per_block_optin: {gpu.shared - 1024}
      shared_memory_per_core: {gpu.shared} core_count: {gpu.cores} fpus_per_core: {128 if gpu.capability[0] > 8 else 64}
      block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
      memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
      device_memory_size: {chip.hbm} registers_per_core_limit: {2**16} registers_per_block_limit: {2**16}
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
      driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 12 minor: 9 patch: 0 }}
    device_description_str: "{gpu.name}"
  """
