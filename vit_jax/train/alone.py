"""One run at a time in a workdir: a second would write over the metrics and the checkpoints of the first.

    <workdir>/run.lock    host and process of the run, as long as it lasts

What counts is the system's lock on the file, not that the file is there: the lock ends with the process, however it
ends, so that a run which was killed can be started again at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from vit_jax.config import UserError

log = logging.getLogger(__name__)

FILE = "run.lock"
LEASE = 120.0  # seconds after which a file server has let go of the locks of a host that is gone
_EVERY = 2.0  # seconds between two tries


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
  """Nobody else runs in the workdir, which is made if need be; of several processes the first sees to it.

  A lock of the process, which its data workers do not inherit: any of them may outlive it for a moment.

  Raises:
    UserError: if another run is there, or if there can be no such folder.
  """
  if jax.process_index() != 0:
    yield
    return
  check_folder(workdir)
  new = not workdir.exists()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = _locked(workdir / FILE)
  except OSError as error:
    reason = error.strerror or "it is no regular file"
    if os.path.lexists(workdir / FILE) and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
      raise UserError(f"{workdir / FILE}: cannot be used ({reason}); remove it, if no run is here") from error
    raise UserError(
      f"--workdir={workdir}: cannot be made or written to ({reason}); give a folder of your own"
    ) from error
  try:
    yield
  finally:
    if file is not None:
      with contextlib.suppress(OSError):
        os.unlink(file.name)  # before the lock ends: the file of a later run stays
      file.close()
    if new:
      with contextlib.suppress(OSError):
        workdir.rmdir()  # if the run was refused before it wrote anything


def check_folder(workdir: Path) -> None:
  """Refuses a workdir that is a file, or in one.

  Raises:
    UserError: naming the file.
  """
  found = next((path for path in (workdir, *workdir.parents) if path.exists()), None)
  if found is not None and not found.is_dir():
    what = "is a file" if found == workdir else f"{found} is a file"
    raise UserError(f"--workdir={workdir}: {what}; give a folder, which may be one that does not exist yet")


def _locked(path: Path) -> io.TextIOWrapper | None:
  """The file with the lock, which closing it gives up; None where the file system has no locks.

  A holder on another host may be one that died: its lock ends when the file server misses it.
  """
  end = None
  while True:
    file = open(path, "a+", errors="replace")  # noqa: SIM115  (the caller closes it)
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if not _is_at(file, path):  # the run before removed it between our two calls
        file.close()
        continue
    except OSError as error:
      file.seek(0)
      holder = file.read().strip() or "another process"
      file.close()
      if error.errno in (errno.EACCES, errno.EAGAIN):
        if not holder.endswith(f" on {socket.gethostname()}"):
          if end is None:
            end = time.monotonic() + LEASE
            log.warning("%s trains in %s, or did a moment ago: waiting %.0f s.", holder, path.parent, LEASE)
          if time.monotonic() < end:
            time.sleep(_EVERY)
            continue
        raise UserError(
          f"--workdir={path.parent}: {holder} trains here; wait until it ends, stop it, or use another --workdir"
        ) from error
      log.warning("No locks on files in %s (%s): a second run in it will not be noticed.", path.parent, error.strerror)
      return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _is_at(file: io.TextIOWrapper, path: Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False
