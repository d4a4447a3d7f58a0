"""Where JAX's own coordination service listens, which believes everybody who reaches it: where few can.

On one machine it is a socket in a folder that only this user may enter, and that is gone as soon as all are connected.
Otherwise it listens at the one address at which the others have come to process 0, on a free port; who reaches that
port can end the job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.parallel import addresses
from vit_jax.parallel.ending import JoinError

log = logging.getLogger(__name__)


def machine() -> str | None:
  """What two processes have in common exactly if they see the same files of one machine as one user."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/mnt')} {os.getuid()}"
  except OSError:  # no Linux
    return None


def places(coordinator: str, everyone: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """What each process gives to `jax.distributed.initialize`: "jax", where to connect, and "bind", where to listen.

  Args:
    coordinator: "host:port" of process 0.
    everyone: the processes in order, each with "host", its name; "machine", as `machine()` says it there; "reached",
      the address of process 0's machine at which it came.

  Raises:
    JoinError: if one says nothing of the kind.
  """
  for process in everyone:
    if not isinstance(process.get("machine"), str | None):
      raise JoinError(f"a process on {process['host']} speaks of its machine in another way: another version?")
  machines = {process.get("machine") for process in everyone}
  if len(machines) == 1 and None not in machines and (private := _private_socket()):
    return [{"jax": private, "bind": private}] * len(everyone)
  service = addresses.of_service(process["reached"] for process in everyone[1:])
  if service is None:
    log.warning("The processes have reached this one at several addresses: JAX's service listens at all of them.")
  with contextlib.closing(socket.socket(socket.AF_INET6 if service and ":" in service else socket.AF_INET)) as probe:
    probe.bind((service or "", 0))
    port = probe.getsockname()[1]
  host, _ = addresses.split(coordinator)
  # The coordinator's name leads who came by it to the service, and others perhaps to another address.
  known = [host if service in (None, addresses.plain(process["reached"])) else service for process in everyone]
  bind = addresses.join(service or "::", port)
  return [{"jax": addresses.join(name, port), "bind": bind} for name in known]


def is_private(place: str) -> bool:
  return place.startswith("unix:")


def close_door(place: str) -> None:
  """Removes a private socket's folder: who is connected stays so, and nobody else can be."""
  shutil.rmtree(os.path.dirname(place.removeprefix("unix:")), ignore_errors=True)


def _private_socket() -> str | None:
  """The address of a socket that only this user can reach; None where there can be none (its name may be too long)."""
  with contextlib.suppress(OSError):
    folder = tempfile.mkdtemp(prefix="vit_jax-")  # for this user alone
    try:
      with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.bind(f"{folder}/probe")
      os.unlink(f"{folder}/probe")
      if re.fullmatch(r"[\w./-]+", folder, re.ASCII):  # anything else may mean something in an address
        return f"unix:{folder}/jax"
    except OSError:
      pass
    shutil.rmtree(folder, ignore_errors=True)
  return None
