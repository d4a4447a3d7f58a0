"""How far a run is: one readable line, and the timing values behind it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TextIO

from vit_jax.train.goodput import Goodput

log = logging.getLogger(__name__)

_LEAST_FIRST = ("lr", "size", "wait", "speed", "loss", "left")  # parts of the line that narrow terminals lack
_PAUSES = {"compiling": "compile", "evaluation": "evaluation", "saving": "checkpoint"}  # by part of the goodput


class Progress:
  """Measures the speed of a training loop and shows it.

  A plain line is logged every `every` steps; on a terminal one more is kept up to date at the bottom (rich), shortened
  to its width.

      progress = Progress(total_steps, start_step=step, batch_size=64)
      for step in range(start + 1, total_steps + 1):
        with progress.waiting():            # the share of time spent here is shown as "data wait"
          batch = next(batches)
        state, metrics = train_step(state, batch)
        progress.step(step, host_metrics)   # metrics of a late step are fine; None keeps the last ones
        if due:
          with progress.pausing("evaluation"):   # not counted in images/s
            ...

  Args:
    total_steps: the last step of the run.
    start_step: steps done before (when resuming).
    batch_size: images a step, over all devices.
    every: steps between lines, and between updates of `timing`.
    stream: where the live line goes (None: stderr).
    live: True or False to decide; None: when `stream` is a terminal.
    goodput: is told of waiting and of pauses, too.
    clock: seconds, monotonic; for tests.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    batch_size: int,
    start_step: int = 0,
    every: int = 10,
    stream: TextIO | None = None,
    live: bool | None = None,
    goodput: Goodput | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    stream = stream or sys.stderr
    self.total_steps = total_steps
    self.batch_size = batch_size
    self.every = max(1, every)
    self.timing: dict[str, float] = {}  # of the last window of `every` steps; for Writers.timing
    self._clock, self._goodput = clock, goodput
    self._start_step = self._window_step = self._last_step = start_step
    self._window_start = clock()
    self._waited = self._paused = self._recurring = 0.0
    self._metrics: Mapping[str, float] = {}
    self._live = _LiveLine(stream) if (stream.isatty() if live is None else live) else None

  @contextmanager
  def waiting(self, busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Time inside counts as waiting for data, unless the devices are still `busy` when it ends: then none was lost."""
    start = self._clock()
    try:
      yield
    finally:
      if not busy():
        waited = self._clock() - start
        self._waited += waited
        if self._goodput is not None:
          self._goodput.spent("data_wait", waited)

  @contextmanager
  def pausing(self, what: str = "") -> Iterator[None]:
    """Time inside (evaluation, checkpoint, pictures) counts for the ETA but not for images/s.

    What comes once, to compile and what is done before the first step, counts for neither.
    """
    if self._live and what:
      self._live.show(self.line(self._live.width, doing=what))
    start = self._clock()
    try:
      with self._counted(_PAUSES.get(what, "idle")):
        yield
    finally:
      spent = self._clock() - start
      self._paused += spent
      if what != "compiling" and self._last_step > self._start_step:
        self._recurring += spent

  def _counted(self, part: str) -> AbstractContextManager[None]:
    return nullcontext() if self._goodput is None else self._goodput.measuring(part)

  def step(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
    """Call after every step. True when a window of `every` steps is complete and `timing` is new."""
    self._metrics = metrics or self._metrics
    self._last_step = step
    complete = step % self.every == 0 or step == self.total_steps
    if complete and step > self._window_step:
      self._measure(step)
      log.info(self.line(self._live.width if self._live else None))
    if self._live:
      self._live.show(self.line(self._live.width))
    return complete

  def line(self, width: int | None = None, *, doing: str = "") -> str:
    """The progress line: step, crop sizes where they vary, loss, learning rate, images/s, data wait, time left.

    Args:
      width: characters there are: what matters least is left out until the rest fits; None: any number.
      doing: what takes the time now.
    """
    share = f"{self._last_step / max(1, self.total_steps):.0%}"
    parts = [("step", f"step {self._last_step}/{self.total_steps} ({share})")]
    sizes = [self._metrics[key] for key in ("global_size", "local_size", "gram_size") if key in self._metrics]
    if sizes:
      parts.append(("size", f"{'/'.join(f'{size:.0f}' for size in sizes)} px"))
    for name, value in self._metrics.items():
      if name == "loss" or name.endswith("/loss"):  # of several students, each its own
        parts.append(("loss", f"{name.replace('/', ' ')} {float(value):.4f}"))
    if "lr" in self._metrics:
      parts.append(("lr", f"lr {float(self._metrics['lr']):.2e}"))
    if self.timing:
      parts.append(("speed", f"{_three_digits(self.timing['images_per_second'])} images/s"))
      parts.append(("wait", f"data wait {self.timing['data_wait_share']:.0%}"))
      parts.append(("left", f"ETA {duration(self.timing['eta_seconds'])}"))
    if doing:
      parts.append(("doing", f"[{doing}]"))
    line = "  ".join(text for _, text in parts)
    for least in _LEAST_FIRST:
      while width is not None and len(line) > width and least in dict(parts):
        del parts[max(i for i, (what, _) in enumerate(parts) if what == least)]
        line = "  ".join(text for _, text in parts)
    return line

  def close(self) -> None:
    """Gives the terminal back; the last line stays."""
    if self._live:
      self._live.close()
      self._live = None

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self.close()
    except Exception as error:  # of a terminal that is gone, perhaps
      if kind is None:
        raise
      log.warning("The progress line could not be closed: %s", error)

  def _measure(self, step: int) -> None:
    now = self._clock()
    seconds = max(1e-9, now - self._window_start - self._paused)
    steps = step - self._window_step
    pause_per_step = self._recurring / (step - self._start_step)
    self.timing = {
      "images_per_second": steps * self.batch_size / seconds,
      "step_seconds": seconds / steps,
      "data_wait_share": min(1.0, self._waited / seconds),
      "pause_seconds": self._paused,
      "eta_seconds": (self.total_steps - step) * (seconds / steps + pause_per_step),
    }
    self._window_start, self._window_step = now, step
    self._waited = self._paused = 0.0


class _LiveLine:
  """One line at the bottom of a terminal; prints and log messages appear above it."""

  def __init__(self, stream: TextIO):
    from rich.console import Console
    from rich.live import Live

    self._live = Live(console=Console(file=stream, highlight=False), auto_refresh=False, vertical_overflow="crop")
    before = sys.stderr
    self._live.start()  # replaces sys.stdout and sys.stderr by proxies that print above the line …
    self._moved = [  # … but log handlers hold the stream they were made with
      h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and h.stream is before
    ]
    self._before = before
    for handler in self._moved:
      handler.setStream(sys.stderr)

  @property
  def width(self) -> int:
    """Characters of the terminal, which may change."""
    return self._live.console.width

  def show(self, line: str) -> None:
    from rich.text import Text

    self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

  def close(self) -> None:
    self._live.stop()
    for handler in self._moved:
      handler.setStream(self._before)


def duration(seconds: float) -> str:
  """A time span for people: "42 s", "12 min 30 s", "3 h 20 min", "2 d 4 h"."""
  seconds = int(round(seconds))
  for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
    if seconds >= size:
      rest = seconds % size // small
      return f"{seconds // size} {name}" + (f" {rest} {small_name}" if rest else "")
  return f"{seconds} s"


def _three_digits(value: float) -> str:
  return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
