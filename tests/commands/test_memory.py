"""A process that computes on its CPU gets large pages, where the system gives them to who asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vit_jax.commands import memory

ASKED = "always [madvise] never"
CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
  "environment, offered, devices, wanted",
  [
    (CPU, ASKED, True, True),
    ({"JAX_PLATFORMS": "cuda,cpu"}, ASKED, False, False),
    ({}, ASKED, True, False),
    ({}, ASKED, False, True),
    (CPU, "[always] madvise never", False, False),
    (CPU, "", False, False),
    (CPU | {"GLIBC_TUNABLES": ""}, ASKED, False, False),
  ],
  ids=["CPU asked for", "GPU asked for", "accelerator", "none", "given unasked", "unknown", "chosen"],
)
def test_when_a_process_begins_anew(monkeypatch, environment, offered, devices, wanted):
  monkeypatch.setattr(memory.glob, "glob", lambda pattern: ["/dev/nvidia0"] if devices else [])
  assert memory.wants_large_pages(environment, offered) is wanted


def test_begins_anew_once_with_its_arguments(tmp_path):
  """In a process of its own, which says who it is each time it begins."""
  (tmp_path / "offered").write_text(ASKED)
  script = (
    "import os, pathlib, sys; from vit_jax.commands import memory; "
    "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES')); "
    f"memory._PAGES = pathlib.Path({str(tmp_path / 'offered')!r}); memory.use_large_pages(); print('goes on')"
  )
  clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"} | CPU
  done = subprocess.run(
    [sys.executable, "-c", script, "a b", "--c"], env=clean, capture_output=True, text=True, check=True
  )
  first, second, end = done.stdout.splitlines()
  process = first.split()[0]
  assert first == f"{process} ['a b', '--c'] None"
  assert second == f"{process} ['a b', '--c'] glibc.malloc.hugetlb=1"
  assert end == "goes on"
