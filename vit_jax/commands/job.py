"""A command as one of the processes of a job, and which errors are for its user."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vit_jax.config.errors import UserError
from vit_jax.config.fields import fields

if TYPE_CHECKING:
  from vit_jax.parallel.lifeline import Lifeline


@contextlib.contextmanager
def in_job(args: argparse.Namespace) -> Iterator[bool]:
  """Joins the processes of the job; gives whether this is the first of them, which speaks for all.

  Where there are several, an exception ends the process here, after the others have been told.
  """
  from vit_jax.parallel import processes

  given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id", "local_device_ids")}
  member = processes.join(processes.find(**given), timeout=args.join_timeout)
  if member is None:
    yield True
    return
  _log_as(member)
  try:
    yield member.process == 0
  except SystemExit as end:
    if end.code and not member.agreed("stop"):  # by a signal while nothing was to be saved: the others know nothing
      member.fail("asked to stop; the same command goes on", end.code, others=end.code)
    raise
  except KeyboardInterrupt:
    member.fail("interrupted", 130, others=130)
  except Exception as error:
    from jax.errors import JaxRuntimeError

    if is_for_user(error):
      member.fail(str(error), 2)
    # A computation that breaks off is mostly the end of another process, which says more.
    member.fail(traceback.format_exc(), 1, wait=3.0 if isinstance(error, JaxRuntimeError) else 0.0)
  finally:
    member.leave()


def _log_as(member: Lifeline) -> None:
  """From now on messages say of which process they are; those of progress are the first one's."""
  for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter(f"{member.name}: %(message)s" if member.process else "%(message)s"))
  if member.process:
    logging.getLogger("vit_jax").setLevel(logging.WARNING)


def is_for_user(error: Exception) -> bool:
  """Whether an error's message tells the user what to put right.

  So do the exceptions that vit_jax defines, and a ValueError or ImportError that opens with a key of the config: most
  rooms know nothing of `vit_jax.config` and name the key in a plain one.
  """
  if isinstance(error, UserError) or type(error).__module__.partition(".")[0] == "vit_jax":
    return True
  return isinstance(error, ValueError | ImportError) and re.split(r"[=:\s]", str(error), maxsplit=1)[0] in fields()
