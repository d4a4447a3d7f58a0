"""The processes of a job as threads of this one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time

from vit_jax.parallel import lifeline

SECRET = b"a secret of the job"


def free_address() -> str:
  with contextlib.closing(socket.socket()) as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def join(
  address: str, process: int, count: int, timeout: float = 20.0, host: str = "h", secret: bytes = SECRET
) -> lifeline.Lifeline:
  def prepare(everyone):
    return [{"you": i} for i in range(count)]

  return lifeline.join(
    address, process, count, timeout=timeout, host=f"{host}{process}", about={}, prepare=prepare, secret=secret
  )


def in_parallel(*calls):
  """What the calls return, or raise, made at the same time."""
  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    futures = [pool.submit(call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def eventually(condition) -> bool:
  until = time.monotonic() + 10
  while not condition() and time.monotonic() < until:
    time.sleep(0.02)
  return condition()
