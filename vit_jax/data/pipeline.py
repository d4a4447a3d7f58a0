"""The training pipeline: source -> shuffled, augmented, masked batches, with a state that is one number.

A batch is the next few loss groups (`groups.py`) of an endless stream, so that its content depends on the seed and its
place alone: not on how many processes share the batch, how many workers decode it, or where the run was interrupted.
Grain supplies the threads and the worker processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from vit_jax import files
from vit_jax.data.groups import BAD, LossGroups, Unreadable
from vit_jax.data.sources import Source
from vit_jax.data.views.base import Views

log = logging.getLogger(__name__)

_MIN_SAMPLE = 1000  # records below which a share of unreadable ones is not yet a verdict
_EXAMPLES = 3  # unreadable images that an error names
_SHARED_MEMORY = "/dev/shm"
_STREAM = 1 << 60  # groups in the "endless" stream
_PATIENCE = 30.0  # seconds in which a thread comes to the end of its loss group, unless its read hangs


def make_pipeline(
  source: Source,
  views: Views,
  *,
  batch_size: int,
  seed: int,
  workers: int,
  process_index: int = 0,
  process_count: int = 1,
  local_groups: Sequence[int] | None = None,
  bad_records: str | os.PathLike | None = None,
  max_bad_fraction: float = 0.01,
  timeout: float | None = None,
) -> Pipeline:
  """The batches of a training run: an endless iterator of this process's rows, that can be saved and restored.

  Args:
    source: where the records come from.
    views: the crops and masks to make.
    batch_size: images of a batch over all processes; process i has rows i b/n … (i + 1) b/n - 1.
    seed: decides the order of the records, every crop and every mask.
    workers: processes that decode and augment; 0: threads of this process; -1: chosen from the number of cores.
    process_index: this process among those of the job.
    process_count: processes of the job.
    local_groups: the loss groups of every batch that this process makes; None: those of an equal part, by its index.
    bad_records: a file to which unreadable images are added, one JSON object a line.
    max_bad_fraction: share of unreadable images above which the run stops (see `BadRecords`).
    timeout: seconds after which a batch that does not come is reported, and a record that does not come from an object
      store asked for again; None: never.

  Raises:
    ValueError: if batch size, loss groups and processes do not fit together.
  """
  group_size = views.group_size(batch_size)
  if local_groups is not None:
    process_index, process_count = 0, 1  # no equal part has to be found
  if batch_size % process_count:
    raise ValueError(f"batch_size = {batch_size} cannot be shared by {process_count} processes: make it a multiple.")
  rows = batch_size // process_count
  if rows % group_size:
    raise ValueError(
      f"loss_group_size = {group_size} does not divide the {rows} images of each process (batch_size {batch_size} over "
      f"{process_count} processes): loss groups are never split; choose a divisor of {rows}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index = {process_index} is not one of {process_count} processes.")
  if workers < -1:
    raise ValueError(f"data.workers = {workers}: it must be -1 (automatic), 0 (threads), or a number of processes.")
  if local_groups is None:
    local_groups = range(process_index * rows // group_size, (process_index + 1) * rows // group_size)
  if workers == -1:
    workers = _automatic_workers(buffers=2 * len(local_groups) * _group_bytes(views, group_size))
  groups = LossGroups(source, views, seed, group_size, batch_size // group_size, timeout=timeout)
  stream = {"seed": seed, "records": len(source), "batch_size": batch_size, "loss_group_size": group_size}
  return Pipeline(
    groups,
    groups_per_batch=batch_size // group_size,
    local_groups=local_groups,
    stream={**stream, **groups.order.identity},
    workers=workers,
    bad=BadRecords(bad_records, max_bad_fraction, records=len(source)),
    timeout=timeout,
  )


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _automatic_workers(buffers: int) -> int:
  """Half of the cores; none below four, where a process costs more than it brings, or without memory for `buffers`."""
  if _cores() < 4:
    return 0
  free = _shared_memory()
  if buffers > free:
    log.warning(
      "Images are decoded by threads: processes would need %.0f MB of shared memory, of which %.0f MB are free (in a "
      "container, start it with a larger --shm-size, or lower batch_size).",
      buffers / 1e6,
      free / 1e6,
    )
    return 0
  return min(16, _cores() // 2)


def _group_bytes(views: Views, group_size: int) -> int:
  """Of the largest loss group."""
  shapes = [view.arrays(group_size).values() for view in views.variants()]
  return max(sum(math.prod(shape) * kind.itemsize for shape, kind in arrays) for arrays in shapes)


def _shared_memory() -> int:
  """Bytes that processes can share; without such a file system (not Linux) it is not known to be limited."""
  return shutil.disk_usage(_SHARED_MEMORY).free if os.path.isdir(_SHARED_MEMORY) else sys.maxsize


class _LocalGroups:
  """Numbers the groups of this process without gaps: its k-th group -> the group's arrays. Picklable."""

  def __init__(self, groups: LossGroups, groups_per_batch: int, local_groups: Sequence[int], first_batch: int):
    self._groups = groups
    self._groups_per_batch = groups_per_batch
    self._local_groups = local_groups
    self._first_batch = first_batch

  def __call__(self, k: int) -> dict[str, np.ndarray | str]:
    batch, group = divmod(int(k), len(self._local_groups))
    return self._groups[(self._first_batch + batch) * self._groups_per_batch + self._local_groups[group]]


class Pipeline:
  """An endless iterator over batches: dicts of the arrays of this process's rows that the views describe.

  Where the views have several variants, each batch is of one of them: `views` says which the next is.

  `get_state()` is a small dict that JSON can hold; `set_state()` of it makes the next batch exactly the one that would
  have come next, on any number of workers and processes.
  """

  def __init__(
    self,
    groups: LossGroups,
    *,
    groups_per_batch: int,
    local_groups: Sequence[int],
    stream: dict[str, int | str],
    workers: int,
    bad: BadRecords,
    timeout: float | None,
  ):
    self._groups = groups
    self._timeout = timeout
    self._groups_per_batch = groups_per_batch
    self._local_groups = local_groups
    self._stream = stream
    self.workers = workers
    self.bad = bad
    self._next_batch = 0
    self._iterator: grain.DatasetIterator | None = None
    self._begun: Future | None = None  # the first group of an iterator that was begun before it was asked for
    self._threads: set[threading.Thread] = set()  # of this process, that have worked for this pipeline
    self._closed = self._torn = False

  def __iter__(self) -> Pipeline:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    self._open()
    try:
      with _reporting_stalls(self._timeout, self._next_batch):
        groups = [self._next_group() for _ in self._local_groups]
    except BaseException as error:
      self._torn = True  # a later next() begins this batch again
      if isinstance(error, Exception):
        self._stop()  # else it is a request to stop, which does not wait for a source that may hang
      raise
    met = [entry for group in groups for entry in json.loads(str(group.pop(BAD)))]
    self._next_batch += 1
    seen = self._next_batch * len(self._local_groups) * self._stream["loss_group_size"]
    self.bad.add(met, seen)
    if len(groups) == 1 and self.workers == 0:
      return groups[0]
    # Also a copy out of the memory shared with the workers, which is scarce (64 MB in many containers).
    return {key: np.concatenate([group[key] for group in groups]) for key in groups[0]}

  def start(self):
    """Begins with the next batches, as `next` would: to be called before what takes long and needs no batch."""
    if self._open():
      # Threads begin at once; processes as soon as somebody waits for what they make.
      self._iterator.start_prefetch()
      if self.workers:
        self._begun = Future()
        threading.Thread(target=_fulfil, args=(self._begun, self._iterator), daemon=True, name="begin-batches").start()

  def _open(self) -> bool:
    """Whether the iterator had to be made."""
    if self._closed:
      raise ValueError("the pipeline is closed.")
    if self._torn:
      self._stop()
    if self._iterator is not None:
      return False
    self._iterator = self._make_iterator()
    return True

  def _next_group(self) -> dict[str, np.ndarray | str]:
    if self._begun is None:
      return next(self._iterator)
    group = self._begun.result()
    self._begun = None
    return group

  @property
  def views(self) -> Views:
    """The variant of the next batch."""
    return self._groups.views(self._next_batch)

  def upcoming(self, batches: int) -> list[Views]:
    """The views that the next so many batches need, each once, in the order in which they come first."""
    return list(dict.fromkeys(self._groups.views(self._next_batch + i) for i in range(batches)))

  def get_state(self) -> dict[str, int | str]:
    """Where the stream is, with what identifies it."""
    return {"next_batch": self._next_batch, **self._stream}

  def set_state(self, state: dict[str, Any], *, exact: bool = True):
    """Continues where `state` was taken.

    Args:
      state: what `get_state` gave, in this run or another.
      exact: refuse the state of another stream (seed, number of records, batch or loss group size), where "the next
        batch" has no meaning; False: go on after as many images as had been used, with a warning.

    Raises:
      ValueError: for a state that cannot be continued exactly.
    """
    changed = [f"{key} {state.get(key)} -> {value}" for key, value in self._stream.items() if state.get(key) != value]
    if changed and exact:
      raise ValueError(
        f"the data cannot be continued exactly where the checkpoint left it: {', '.join(changed)} (then -> now). "
        "Restore these, or accept the change"
      )
    if changed:
      log.warning("the data goes on as another stream, after as many images: %s (then -> now)", ", ".join(changed))
    self._stop()
    images = int(state["next_batch"]) * int(state["batch_size"])
    self._next_batch = math.ceil(images / self._stream["batch_size"])

  def close(self, patience: float = _PATIENCE):
    """Ends the worker processes and threads; returns when they are gone. The pipeline cannot be used afterwards.

    Args:
      patience: seconds after which a thread whose read hangs is left to end with the process.
    """
    self._closed = True
    self._stop(patience)

  def __enter__(self) -> Pipeline:
    return self

  def __exit__(self, *unused: object):
    self.close()

  def _make_iterator(self) -> grain.DatasetIterator:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain asks absl's flags; a script may have none
    make = _LocalGroups(self._groups, self._groups_per_batch, self._local_groups, self._next_batch)
    numbers = grain.MapDataset.range(_STREAM)
    # Two batches at most are kept ready: memory is bounded by the batch, not by Grain's default of 500 elements.
    ahead = 2 * len(self._local_groups)
    if self.workers == 0:
      threads = min(ahead, max(1, _cores() // 2))
      read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
      return iter(numbers.map(functools.partial(self._make_in_thread, make)).to_iter_dataset(read_options))
    alone = numbers.map(make).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=max(1, math.ceil(ahead / self.workers)))
    return iter(alone.mp_prefetch(options, functools.partial(_start_worker, os.getpid())))

  def _make_in_thread(self, make: _LocalGroups, k: int) -> dict[str, np.ndarray | str]:
    self._threads.add(threading.current_thread())
    return make(k)

  def _stop(self, patience: float = _PATIENCE):
    if self._iterator is None:
      return
    end = time.monotonic() + patience
    self._torn = False
    if self._begun is not None:
      wait([self._begun], patience)  # Grain does not expect to be closed while somebody waits
      self._begun = None
    self._iterator.close()
    self._iterator = None
    threads = list(self._threads)
    self._threads.clear()
    for thread in threads:  # Grain tells its threads to end but does not wait
      thread.join(max(0.0, end - time.monotonic()))
    if hanging := sum(thread.is_alive() for thread in threads):
      log.warning("data: %d read(s) of data.source hang; their threads are left.", hanging)
    if self.workers:
      _end_deleter()


def _fulfil(begun: Future, iterator: grain.DatasetIterator):
  try:
    begun.set_result(next(iterator))
  except BaseException as error:
    begun.set_exception(error)


@contextlib.contextmanager
def _reporting_stalls(timeout: float | None, batch: int) -> Iterator[None]:
  """Warns, again and again, of a batch that does not come; costs a thread for the time of one batch."""
  if timeout is None:
    yield
    return
  done = threading.Event()

  def watch():
    waited = timeout
    while not done.wait(timeout):
      log.warning("data: batch %d has not come for %g s (data.timeout): does the source stall?", batch, waited)
      waited += timeout

  watcher = threading.Thread(target=watch, daemon=True, name="watch-batch")
  watcher.start()
  try:
    yield
  finally:
    done.set()
    watcher.join()


def _start_worker(parent: int, *unused: int):
  """Prepares a worker process: it ends by its parent's will, or with it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides

  def watch():
    while os.getppid() == parent:
      time.sleep(1.0)
    os._exit(1)  # the parent was killed: nobody will ever say stop

  threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _end_deleter():
  """Ends the threads with which Grain frees shared memory: it starts them for the process and never ends them."""
  arrays = sys.modules.get("grain._src.python.ipc.shared_memory_array")
  pool = getattr(getattr(arrays, "SharedMemoryArray", None), "_del_thread_pool", None)
  if pool is not None:
    arrays.SharedMemoryArray._disable_async_del()  # what is left to free is freed at once
    pool.close()
    pool.join()


def _entries(path: Path) -> list[dict[str, Any]]:
  """What a file of unreadable images lists; lines that are damaged are taken out of it: the images are met again.

  Raises:
    DamagedFile: if it cannot be read at all.
  """
  try:
    found = files.read_json_lines(path, _problem_of_entry)
  except files.DamagedFile as error:
    raise files.DamagedFile(path, error.reason, advice="move it away, and the run begins another") from error
  for problem in found.problems():
    log.warning("%s; left out, as the image will be met again.", problem)
  if found.bad or found.torn is not None:
    files.write_bytes(path, b"".join(raw for raw, _ in found.good))
  return [entry for _, entry in found.good]


def _problem_of_entry(entry: Any) -> str | None:
  if isinstance(entry, dict) and type(entry.get("record")) is int and {"name", "reason"} <= entry.keys():
    return None
  return "is no entry of an unreadable image"


class BadRecords:
  """Counts, names and limits the unreadable images of a run.

  Each is warned of and written down once. The run stops when the number of different unreadable images exceeds
  `max_fraction` of those seen so far, where fewer than 1,000 count as 1,000 (so that with the default of 0.01 up to ten
  broken files never stop a run), or when half of the whole source is unreadable.
  """

  def __init__(self, path: str | os.PathLike | None, max_fraction: float, *, records: int):
    self._path = Path(path) if path is not None else None
    self._max_fraction = max_fraction
    self._records = records
    self._known: dict[int, str] = {}
    if self._path is not None and self._path.exists():  # a resumed run
      for entry in _entries(self._path):
        if entry["record"] < records:  # else of a source that held more
          self._known[entry["record"]] = f"{entry['name']}: {entry['reason']}"
    # Images that others took the place of: each of them was looked at besides those of the stream.
    self._replaced = len(self._known)

  @property
  def count(self) -> int:
    """Different unreadable images met so far, earlier runs in the same file included."""
    return len(self._known)

  def _note(self, entry: dict[str, Any]) -> None:
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with open(self._path, "ab", buffering=0) as file:
        files.append(file.fileno(), json.dumps(entry).encode() + b"\n")
    except OSError as error:  # the warning in the log has to do; a full disk ends the run elsewhere
      log.warning("%s: cannot be written (%s).", self._path, error.strerror or error)

  def _looked_at(self, seen: int) -> int:
    """Of how many images those known are a part: of those of the stream, or of these and all tried in their place."""
    own = min(seen, self._records)
    return own if self.count <= own else max(self.count, min(seen + self._replaced, self._records))

  def add(self, met: list[dict[str, Any]], seen: int):
    """Takes note of unreadable images, after `seen` records of the stream.

    Raises:
      Unreadable: if there are too many; it names some.
    """
    for entry in met:
      if entry["record"] in self._known:
        continue
      self._known[entry["record"]] = f"{entry['name']}: {entry['reason']}"
      log.warning("unreadable image, another takes its place: %s: %s", entry["name"], entry["reason"])
      if self._path is not None:
        self._note(entry)
    self._replaced += len(met)
    if not met:
      return
    sample = max(min(seen, self._records), _MIN_SAMPLE)
    if self.count > self._max_fraction * sample or 2 * self.count > self._records:
      examples = "; ".join(list(self._known.values())[:_EXAMPLES])
      listed = f" (all of them are in {self._path})" if self._path is not None else ""
      raise Unreadable(
        f"{self.count} of {self._looked_at(seen)} images are unreadable, more than data.max_bad_fraction = "
        f"{self._max_fraction} allows, such as {examples}{listed}. Check data.source, or raise data.max_bad_fraction."
      )
