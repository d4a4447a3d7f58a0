"""How a process of the command gets the memory of a CPU's arrays from the system."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_LARGE_PAGES = "glibc.malloc.hugetlb=1"  # of the C library: the system may back large blocks with large pages
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def use_large_pages() -> None:
  """Begins this process anew with large pages for large arrays, where these are in its own memory.

  XLA asks for the buffer of a step's temporaries anew each time, gigabytes at once, and the system then clears it page
  by page, with a fault for each: of the 4.7 CPU-seconds of a step of ViT-S/16 0.7, with pages of 4 KiB, and 0.15 with
  pages of 2 MiB (2 CPU cores, AMD EPYC). Whether a process asks for these its C library reads before anything else
  runs, hence the second beginning: the same process with the same arguments, its environment plus GLIBC_TUNABLES.

  To be called before anything heavy is imported. Does nothing where it would be of no use, or where GLIBC_TUNABLES is
  set, to whatever: that is how to do without.
  """
  if wants_large_pages(os.environ, _PAGES.read_text() if _PAGES.exists() else ""):
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _TUNABLES: _LARGE_PAGES})


def wants_large_pages(environment: Mapping[str, str], offered: str) -> bool:
  """Whether a process should begin anew.

  Args:
    environment: of the process.
    offered: what the system says of large pages, as "always [madvise] never": only to who asks.
  """
  return "[madvise]" in offered and _TUNABLES not in environment and _arrays_in_own_memory(environment)


def _arrays_in_own_memory(environment: Mapping[str, str]) -> bool:
  """Whether JAX will compute on the CPU, as far as can be told before it is imported."""
  platforms = environment.get("JAX_PLATFORMS")
  if platforms:
    return platforms == "cpu"
  return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
