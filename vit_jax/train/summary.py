"""One page about a run: summary.md (numbers) and summary.png (curves), both made from the files that the run wrote."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.inspect.chart import Level, Panel, Series, draw
from vit_jax.train import goodput
from vit_jax.train.health import uniform_losses
from vit_jax.train.progress import duration
from vit_jax.train.watch import metrics_of
from vit_jax.train.writers import read_lines

Lines = Sequence[Mapping[str, float]]

_ENTROPY = (
  ("targets", "teacher_entropy"),
  ("mean target", "teacher_marginal_entropy"),
  ("student", "student_entropy"),
)
_BASELINES = {
  "random_init": "untrained network",
  "pixels": "pixels",
  "histogram": "colour histogram",
  "teacher": "frozen teacher",
  "majority": "most frequent class",
}
_NUMBERS = (  # (name in the files, what it says)
  ("loss", "total loss"),
  ("dino_local", "DINO, local crops"),
  ("dino_global", "DINO, global crops"),
  ("ibot", "iBOT, masked patches"),
  ("koleo", "KoLeo"),
  ("gram", "Gram anchoring, similarities of patches"),
  ("teacher_entropy", "entropy of the teacher's targets (nats)"),
  ("student_entropy", "entropy of the student's scores (nats)"),
  ("crop_kl", "divergence of the targets of two crops of an image (nats)"),
  ("prototype_usage", "prototypes in use (share)"),
  ("feature_std", "spread of the features (1: isotropic, 0: collapsed)"),
  ("feature_rank", "effective rank of the features"),
  ("patch_similarity", "similarity of the patches of an image with each other"),
  ("patch_cls_similarity", "similarity of patches with the class token (rises as dense features degrade)"),
)


def write_summary(
  workdir: str | os.PathLike,
  *,
  baselines: Mapping[str, float] | None = None,
  alarms: Iterable[object] = (),
  title: str | None = None,
) -> Path:
  """Writes summary.md and summary.png into the directory of a run and returns the path of summary.md.

  Of several students each has its part of the page and a picture, summary_NAME.png.

  Reads metrics.jsonl, timing.jsonl and config.json; needs none of them to be complete.

  Args:
    workdir: the run.
    baselines: further k-NN top-1 to compare with, {"pixels": 0.07, …}, drawn as horizontal lines. Those recorded as
      "baseline/NAME/knn/top1", and the evaluation at step 0, are found in metrics.jsonl.
    alarms: what the health watch said.
    title: head of the page; None: the name of the directory.
  """
  workdir = Path(workdir)
  metrics, timing = read_lines(workdir / "metrics.jsonl"), read_lines(workdir / "timing.jsonl")
  config_file = workdir / "config.json"
  config = json.loads(config_file.read_text()) if config_file.exists() else {}
  title = title or workdir.resolve().name
  students = tuple(config.get("students", ())) or ("",)
  parts = [f"# {title}", _facts(config, metrics, timing)]
  for name in students:
    lines = [metrics_of(line, name, students) for line in metrics] if name else metrics
    levels = _recorded_baselines(lines) | dict(baselines or {})
    picture = f"summary_{name}.png" if name else "summary.png"
    chart = draw(panels(lines, config, levels), title=f"{title}: {name}" if name else title)
    Image.fromarray(chart).save(workdir / picture)
    parts += [f"# Student {name}" if name else "", f"![curves]({picture})", _score_table(lines, levels)]
    parts += [_number_table(lines)]
  parts += [goodput.table(goodput.read(workdir)), _alarm_list(alarms), _file_list(workdir)]
  path = workdir / "summary.md"
  path.write_text("\n\n".join(part for part in parts if part) + "\n")
  return path


def _recorded_baselines(metrics: Lines) -> dict[str, float]:
  """k-NN top-1 of everything that was scored beside the model, by a name for people."""
  found = {}
  for line in metrics:
    for key, value in line.items():
      if key.startswith("baseline/") and key.endswith("/knn/top1"):
        name = key.split("/")[1]
        found[_BASELINES.get(name, name)] = value
  steps, knn = curve(metrics, "knn/top1")
  if len(steps) and steps[0] == 0:
    found.setdefault(_BASELINES["random_init"], float(knn[0]))
  return found


def curve(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps and values of one metric, in the order of the file."""
  pairs = [(line["step"], line[name]) for line in lines if name in line]
  return np.array([s for s, _ in pairs], np.float64), np.array([v for _, v in pairs], np.float64)


def panels(metrics: Lines, config: Mapping, baselines: Mapping[str, float]) -> list[Panel]:
  """The six charts of the page: losses, KoLeo, entropies, k-NN, features, learning rate."""
  counts = {name: int(config[name]["prototypes"]) for name in ("dino", "ibot") if name in config}
  guesses = uniform_losses(counts, config["ibot"]["mask_probability"]) if "ibot" in counts else {}

  def several(*named: tuple[str, str], trend: bool = False, dots: bool = False) -> list[Series]:
    return [Series(label, *curve(metrics, name), trend=trend, dots=dots) for label, name in named]

  losses = []
  for label, name in (("DINO local", "dino_local"), ("DINO global", "dino_global"), ("iBOT", "ibot")):
    steps, values = curve(metrics, name)
    losses.append(Series(label, steps, values / guesses.get(name, 1.0), trend=True))
  tasks = [
    Series(label, *(curve(metrics, name) * np.array([[1], [100]])), dots=True)
    for label, name in (("k-NN top-1", "knn/top1"), ("linear top-1", "linear/top1"))
  ]
  features = several(("spread", "feature_std"), ("prototypes in use", "prototype_usage"), trend=True)
  steps, rank = curve(metrics, "feature_rank")
  if np.isfinite(rank).any():
    most = max(1.0, float(rank[np.isfinite(rank)].max()))
    features.append(Series(f"effective rank / {most:.0f}", steps, rank / most, trend=True))
  return [
    Panel("Losses, 1 = the uniform guess", losses, [Level("uniform", 1.0)]) if guesses else Panel("Losses", losses),
    Panel("KoLeo", several(("KoLeo", "koleo"), trend=True)),
    Panel(
      "Entropy (nats)",
      several(*_ENTROPY, trend=True),
      [Level(f"log {counts['dino']} =", math.log(counts["dino"]))] if "dino" in counts else [],
    ),
    Panel(
      "Accuracy on frozen features (%)",
      [series for series in tasks if len(series.x)],
      [Level(name, 100 * value) for name, value in baselines.items()],
      from_zero=True,
    ),
    Panel("Teacher features", features, from_zero=True),
    Panel("Learning rate", several(("lr", "lr")), from_zero=True),
  ]


def _facts(config: Mapping, metrics: Lines, timing: Lines) -> str:
  facts = []
  if config:
    trained = ", ".join(f"{name} {own['model']['name']}" for name, own in config.get("students", {}).items())
    facts.append(
      f"{config['method']} · {trained or config['model']['name']} · {config['data']['source']} · "
      f"batch {config['batch_size']} · {config['duration']} · seed {config['seed']}"
    )
  if metrics:
    facts.append(f"last recorded step: {int(max(line['step'] for line in metrics))}")
  steps, seconds = curve(timing, "step_seconds")
  if len(steps):
    windows = np.diff(steps, prepend=0)
    rate = np.median(curve(timing, "images_per_second")[1])
    facts.append(f"training time: {duration(float(np.sum(windows * seconds)))}, median {rate:.0f} images/s")
  return "  \n".join(facts)


def _score_table(metrics: Lines, baselines: Mapping[str, float]) -> str:
  rows = []
  for name, label in (("knn/top1", "k-NN top-1"), ("linear/top1", "linear probe top-1")):
    steps, values = curve(metrics, name)
    if len(values):
      best = int(np.argmax(values))
      rows.append(f"| {label} | **{values[-1]:.1%}** | {values[best]:.1%} (step {int(steps[best])}) |")
  if not rows:
    return ""
  rows += [f"| {name} (k-NN) | {value:.1%} | |" for name, value in baselines.items()]
  return "\n".join(["## Accuracy on frozen features", "", "| | at the end | best |", "|---|---|---|", *rows])


def _number_table(metrics: Lines) -> str:
  rows = []
  for name, label in _NUMBERS:
    _, values = curve(metrics, name)
    if len(values):
      tenth = max(1, len(values) // 10)
      rows.append(f"| {label} | `{name}` | {np.mean(values[:tenth]):.4g} | {np.mean(values[-tenth:]):.4g} |")
  if not rows:
    return ""
  return "\n".join(["## Training", "", "| | metric | first tenth | last tenth |", "|---|---|---|---|", *rows])


def _alarm_list(alarms: Iterable[object]) -> str:
  lines = [f"- {alarm}" for alarm in alarms]
  return "\n".join(["## Warnings", "", *lines]) if lines else ""


def _file_list(workdir: Path) -> str:
  known = (
    ("checkpoints", "checkpoints, by step"),
    ("metrics.jsonl", "every metric, one JSON object a line"),
    ("timing.jsonl", "speed and waiting"),
    ("goodput.json", "where the time went, start by start"),
    ("pictures", "pictures"),
    ("tensorboard", "TensorBoard events: `tensorboard --logdir` on this directory"),
    ("config.json", "the resolved configuration"),
  )
  rows = [f"- `{name}`: {what}" for name, what in known if (workdir / name).exists()]
  return "\n".join(["## Files", "", *rows]) if rows else ""
