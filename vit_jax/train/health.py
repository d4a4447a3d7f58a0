"""Is the run healthy? A watch over the logged metrics that says, once and plainly, what is wrong and what to change.

    health = Health(total_steps, batch_size=64, prototypes={"dino": 65536, "ibot": 65536})
    for alarm in health.check(step, metrics):
      log.warning(alarm)

Nothing here touches the device: it reads the numbers that are logged anyway. A resumed run first replays the lines of
its metrics file through `check`, so that it knows how the run began and does not repeat itself. It looks for

    nonfinite    a metric is NaN or infinite
    collapse     features that had spread have become nearly the same for every image (feature_std or feature_rank)
    prototypes   the teacher sends everything to a handful of prototypes (prototype_usage tiny, targets sharp)
    stuck        targets and losses stay at the uniform guess, log K, and k-NN accuracy does not rise
    divergence   the student is worse than the uniform guess, or the loss has grown well beyond where it began
    dense        patches have become like the class token: the degradation that Gram anchoring cures
    knn          k-NN accuracy is no better than that of the untrained model

Features of an untrained network are all alike and spread slowly. Measured on the quick start at batch 32: feature_std
1e-4 at first, 0.05 after 55 steps, 0.6 after 110, with the targets still uniform to 1e-3. So a small feature_std alone
means nothing; what matters is whether it comes back down.

SSL losses are no measure of quality (they may stay flat or rise, with the teacher's temperature, while features
improve), so no rule asks that the loss falls; each compares with a value that has a meaning, log K above all.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

GRACE_SHARE, GRACE_STEPS = 0.1, 10_000  # the first steps are turbulent: judge only after this
PATIENCE = 5  # lines in a row that must show the same before it is said
SETTLED = 0.5  # share of the run after which something must have been learned
FEATURE_STD, SPREAD_STD = 0.05, 0.15  # 1 is isotropic, 0 is constant; collapse: below the first after the second
FEATURE_RANK, SPREAD_RANK = 1.5, 4.0  # directions that the features of a batch use, at least 1
UNIFORM = 0.995  # of log K
SHARP = 0.1  # of log K
WORSE_THAN_UNIFORM = 1.15  # of log K
BETTER = 1.2  # of the first k-NN accuracy: features are learned, whatever the losses say
DENSE, DENSE_RISE = 0.7, 0.3  # similarity of patches with the class token, and how far it has risen from its lowest
GROWN = 1.3  # of the loss at the start of the run
SPREADS = {"feature_std": (FEATURE_STD, SPREAD_STD), "feature_rank": (FEATURE_RANK, SPREAD_RANK)}


@dataclass(frozen=True)
class Alarm:
  """One thing that is wrong; `str(alarm)` is the warning to print."""

  kind: str
  step: int
  message: str

  def __str__(self) -> str:
    return f"step {self.step}: {self.message}"


class Health:
  """Judges metrics line by line; says each kind of trouble at most once.

  Args:
    total_steps: length of the run.
    batch_size: images a step.
    prototypes: number of prototypes by loss, {"dino": K, "ibot": K}; may be empty for methods without.
    mask_probability: share of the global crops that are masked: the iBOT loss is a mean over all of them, so the
      uniform guess scores this share of log K.

  Attributes:
    alarms: all alarms raised so far.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    batch_size: int,
    prototypes: Mapping[str, int] | None = None,
    mask_probability: float = 0.5,
  ):
    self.total_steps = total_steps
    self.batch_size = batch_size
    self.prototypes = dict(prototypes or {})
    self.uniform = uniform_losses(self.prototypes, mask_probability)
    self.alarms: list[Alarm] = []
    self._grace = min(GRACE_SHARE * total_steps, GRACE_STEPS)
    self._in_a_row: Counter[str] = Counter()
    self._first_losses: list[float] = []
    self._losses: deque[float] = deque(maxlen=PATIENCE)
    self._first_knn = self._last_knn = math.nan
    self._lowest = (math.inf, 0)  # of patch_cls_similarity, and at which step
    self._spread: set[str] = set()  # of feature_std and feature_rank: those that have been large

  def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Judges the metrics of one step (host numbers; any subset of the names) and returns the new alarms."""
    new = []
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if broken:
      new += self._raise("nonfinite", step, _nonfinite(broken))
    else:
      self._remember(metrics)
      judged = step >= self._grace
      for kind, needs, rule in (
        ("collapse", ("feature_std", "feature_rank"), self._collapse),
        ("prototypes", ("prototype_usage",), self._prototypes),
        ("stuck", ("teacher_entropy",), self._stuck),
        ("divergence", ("loss",), self._divergence),
        ("dense", ("patch_cls_similarity",), self._dense),
      ):
        if not judged or not any(name in metrics for name in needs):
          continue
        message = rule(step, metrics)
        self._in_a_row[kind] = self._in_a_row[kind] + 1 if message else 0
        if self._in_a_row[kind] >= PATIENCE:
          new += self._raise(kind, step, message)
      message = self._knn(step, metrics)
      if message:
        new += self._raise("knn", step, message)
    return new

  def _raise(self, kind: str, step: int, message: str) -> list[Alarm]:
    if any(alarm.kind == kind for alarm in self.alarms):
      return []
    self.alarms.append(Alarm(kind, step, message))
    return self.alarms[-1:]

  def _remember(self, metrics: Mapping[str, float]) -> None:
    if "loss" in metrics:
      self._losses.append(metrics["loss"])
      if len(self._first_losses) < PATIENCE:
        self._first_losses.append(metrics["loss"])
    self._spread |= {name for name, (_, large) in SPREADS.items() if metrics.get(name, 0.0) > large}
    if "knn/top1" in metrics:
      self._last_knn = metrics["knn/top1"]
      self._first_knn = self._last_knn if math.isnan(self._first_knn) else self._first_knn

  def _collapse(self, step: int, metrics: Mapping[str, float]) -> str | None:
    fallen = [
      f"{name} {metrics[name]:.3g}"
      for name, (small, _) in SPREADS.items()
      if name in self._spread and metrics.get(name, math.inf) < small
    ]
    if not fallen:
      return None
    return (
      f"collapse: the teacher again gives every image nearly the same feature ({', '.join(fallen)}). Such a run does "
      "not recover by itself. Start it again with a lower schedules.lr.peak, a longer schedules.lr.warmup, a larger "
      "koleo.loss_weight, or a higher schedules.momentum.start."
    )

  def _prototypes(self, step: int, metrics: Mapping[str, float]) -> str | None:
    count = self.prototypes.get("dino")
    if count is None:
      return None
    used = metrics["prototype_usage"] * count
    possible = min(count, 2 * self.batch_size)  # one sharp target for each global crop cannot use more
    sharp = metrics.get("teacher_entropy", 0.0) < SHARP * math.log(count)
    if used > max(2.0, 0.02 * possible) or not sharp:
      return None
    return (
      f"prototype collapse: the teacher assigns the whole batch to about {used:.1f} of {count} prototypes. Raise "
      "schedules.teacher_temperature (start and peak), lower schedules.lr.peak, or use fewer dino.prototypes."
    )

  def _stuck(self, step: int, metrics: Mapping[str, float]) -> str | None:
    count = self.prototypes.get("dino")
    if count is None or step < SETTLED * self.total_steps or self._last_knn > BETTER * self._first_knn:
      return None
    uniform = math.log(count)
    losses = [metrics[name] for name in ("dino_local", "dino_global") if name in metrics]
    if metrics["teacher_entropy"] < UNIFORM * uniform or any(loss < UNIFORM * uniform for loss in losses):
      return None
    return (
      f"nothing learned yet: after {step / self.total_steps:.0%} of the run the teacher's targets are still uniform "
      f"(teacher_entropy {metrics['teacher_entropy']:.3f}, log of {count} prototypes = {uniform:.3f}). Raise "
      "schedules.lr.peak, lower schedules.teacher_temperature.peak (to 0.04), use fewer dino.prototypes and "
      "ibot.prototypes for small batches, or train longer."
    )

  def _divergence(self, step: int, metrics: Mapping[str, float]) -> str | None:
    for name, uniform in self.uniform.items():
      if metrics.get(name, 0.0) > WORSE_THAN_UNIFORM * uniform:
        return _diverging(f"{name} is {metrics[name]:.3f}, worse than guessing uniformly ({uniform:.3f})")
    start = sorted(self._first_losses)[len(self._first_losses) // 2]
    now = sorted(self._losses)[len(self._losses) // 2]
    if start > 0 and now > GROWN * start:
      return _diverging(f"the loss has grown from {start:.3f} to {now:.3f}")
    return None

  def _dense(self, step: int, metrics: Mapping[str, float]) -> str | None:
    now = metrics["patch_cls_similarity"]
    self._lowest = min(self._lowest, (now, step))
    lowest, when = self._lowest
    if now < DENSE or now - lowest < DENSE_RISE:
      return None
    return (
      f"dense features degrade: patches resemble the class token ever more (patch_cls_similarity {now:.2f}, "
      f"{lowest:.2f} at step {when}). If dense tasks matter, add a stage of Gram anchoring that starts from a "
      "checkpoint of about that step (gram.source), or evaluate earlier checkpoints."
    )

  def _knn(self, step: int, metrics: Mapping[str, float]) -> str | None:
    if "knn/top1" not in metrics or step < SETTLED * self.total_steps or metrics["knn/top1"] > self._first_knn:
      return None
    return (
      f"k-NN accuracy ({metrics['knn/top1']:.3f}) is no better than at its first evaluation ({self._first_knn:.3f}) "
      f"after {step / self.total_steps:.0%} of the run. Look at the crops (vit-jax inspect batch): do local crops "
      "still show what the labels mean? Otherwise change schedules.lr.peak or train longer."
    )


def uniform_losses(prototypes: Mapping[str, int], mask_probability: float) -> dict[str, float]:
  """What the loss terms are worth to a student that thinks every prototype equally likely, by metric name."""
  values = {}
  if "dino" in prototypes:
    values["dino_local"] = values["dino_global"] = math.log(prototypes["dino"])
  if "ibot" in prototypes:
    values["ibot"] = mask_probability * math.log(prototypes["ibot"])
  return values


def _nonfinite(names: list[str]) -> str:
  return (
    f"not finite: {', '.join(names)}. If it stays so, the run is lost: go back to an earlier checkpoint with a lower "
    "schedules.lr.peak or optim.clip, and with model.dtype=float32 if it was bfloat16."
  )


def _diverging(what: str) -> str:
  return (
    f"diverging: {what}. Lower schedules.lr.peak, lengthen schedules.lr.warmup, lower optim.clip, or raise "
    "schedules.momentum.start."
  )
