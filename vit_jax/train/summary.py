"""One page about a run: summary.md (numbers) and summary.png (curves), both made from the files that the run wrote."""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_jax import checkpoints, files
from vit_jax import config as configs
from vit_jax.evaluation.names import neighbours
from vit_jax.inspect.chart import Level, Panel, Series, draw
from vit_jax.train import goodput
from vit_jax.train.health import SETTLED, SPREADS, Alarm, uniform_losses
from vit_jax.train.interrupts import Stopped
from vit_jax.train.progress import duration
from vit_jax.train.setup import CONFIG_FILE
from vit_jax.train.watch import Watch, metrics_of
from vit_jax.train.writers import METRICS, read_lines

log = logging.getLogger(__name__)

SUMMARY = "summary.md"
Lines = Sequence[Mapping[str, float]]

_NO_ARCHITECTURE = {"name", "dtype", "quantization", "remat", "unroll", "drop_path"}  # how it is trained
_LONGEST = 500  # characters of an error

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
  coming: Iterable[int] = (),
  ended: BaseException | None = None,
) -> Path:
  """Writes summary.md and summary.png into the directory of a run and returns the path of summary.md.

  Of several students each has its part of the page and a picture, summary_NAME.png.

  Reads metrics.jsonl, timing.jsonl, goodput.json and config.json; needs none of them to be complete.

  Args:
    workdir: the run.
    baselines: further k-NN top-1 to compare with, {"pixels": 0.07, …}, drawn as horizontal lines. Those recorded as
      "baseline/NAME/knn/top1", and the evaluation at step 0, are found in metrics.jsonl.
    alarms: what the health watch said.
    title: head of the page; None: the name of the directory.
    coming: steps that are being saved.
    ended: what ended the run before its end.
  """
  workdir = Path(workdir)
  title = title or workdir.resolve().name
  metrics, config = read_lines(workdir / METRICS), _config(workdir)
  pictures = {}
  for name, lines, levels in _students(config, metrics, baselines):
    pictures[name] = f"summary_{name}.png" if name else "summary.png"
    encoded = io.BytesIO()
    chart = draw(panels(lines, config, levels), title=f"{title}: {name}" if name else title)
    Image.fromarray(chart).save(encoded, format="PNG")
    files.write_bytes(workdir / pictures[name], encoded.getvalue())
  text = _page(
    workdir, title, config, metrics, baselines, alarms=alarms, pictures=pictures, coming=coming, ended=ended
  )
  files.write_text(workdir / SUMMARY, text)
  return workdir / SUMMARY


def page(workdir: str | os.PathLike) -> str:
  """The text of `write_summary` as the run is now, which may go on; writes nothing.

  Raises:
    NotSaved: if there is no run.
  """
  workdir = Path(workdir).expanduser()
  if not any((workdir / name).exists() for name in (METRICS, CONFIG_FILE, checkpoints.FOLDER)):
    raise checkpoints.NotSaved(f"{workdir}: no run is there (no {CONFIG_FILE}, {METRICS} or {checkpoints.FOLDER}/)")
  metrics, config = read_lines(workdir / METRICS), _config(workdir)
  return _page(workdir, workdir.resolve().name, config, metrics, None, alarms=_alarms(config, metrics))


def _page(
  workdir: Path,
  title: str,
  config: Mapping,
  metrics: Lines,
  baselines: Mapping[str, float] | None,
  *,
  alarms: Iterable[object],
  pictures: Mapping[str, str] | None = None,
  coming: Iterable[int] = (),
  ended: BaseException | None = None,
) -> str:
  kept = {*checkpoints.steps(workdir), *coming}
  facts = _facts(config, metrics, read_lines(workdir / "timing.jsonl"))
  parts = [f"# {title}", facts, _reason(ended), _alarm_list(alarms)]
  for name, lines, levels in _students(config, metrics, baselines):
    parts += [f"# Student {name}" if name else "", f"![curves]({pictures[name]})" if pictures else ""]
    parts += [_collapse(lines, config), _score_table(lines, levels, kept, config), _number_table(lines)]
  parts += [goodput.table(goodput.read(workdir)), _file_list(workdir)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _students(
  config: Mapping, metrics: Lines, baselines: Mapping[str, float] | None
) -> Iterator[tuple[str, Lines, dict[str, float]]]:
  """Of each model that is trained: its name, its metrics, and what its k-NN accuracy is compared with."""
  students = tuple(config.get("students", ())) or ("",)
  for name in students:
    lines = [metrics_of(line, name, students) for line in metrics] if name else metrics
    yield name, lines, _recorded_baselines(lines) | dict(baselines or {})


def _config(workdir: Path) -> dict[str, Any]:
  """The config of the run, of its file or its newest checkpoint; empty if neither can be read."""
  try:
    return _checked(files.read_json(workdir / CONFIG_FILE, kind=dict), workdir / CONFIG_FILE)
  except FileNotFoundError:
    pass
  except files.DamagedFile as error:
    log.warning("%s; taking the config of the newest checkpoint, if there is one.", error)
  if checkpoints.latest(workdir) is None:
    return {}
  try:
    return _checked(checkpoints.read_meta(workdir)["config"], workdir / checkpoints.FOLDER)
  except (files.DamagedFile, checkpoints.Damaged, checkpoints.Mismatch) as error:
    log.warning("The config cannot be read: %s", error)
    return {}


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
  absent = {"method", "model", "data", "batch_size", "duration", "seed"} - config.keys()
  if absent:
    raise files.DamagedFile(path, f"is no config of a run: it has no {min(absent)!r}")
  known = configs.to_dict(configs.default())
  for key in config.keys() & known.keys():
    if isinstance(known[key], dict):
      inner = config[key]
      if not isinstance(inner, dict) or ("name" in known[key] and not isinstance(inner.get("name"), str)):
        raise files.DamagedFile(path, f"is no config of a run: its {key!r} is {str(inner)[:40]!r}")
  if not isinstance(config["data"].get("source"), str):
    raise files.DamagedFile(path, "is no config of a run: it has no 'data.source'")
  return config


def _alarms(config: Mapping, metrics: Lines) -> list[Alarm]:
  """What the health watch says of the metrics; nothing without a config that this version knows."""
  try:
    known = configs.from_dict(config) if config else None
  except configs.ConfigError as error:
    log.warning("The metrics are not judged: %s", error)
    return []
  if known is None or _total(config) is None:
    return []
  health = Watch(known, _total(config))
  for line in metrics:
    health.check(int(line["step"]), {name: value for name, value in line.items() if name != "step"})
  return health.alarms


def _total(config: Mapping) -> int | None:
  """Steps of the run, as the resolved config says them."""
  match = re.fullmatch(r"(\d+) steps", str(config.get("duration", "")))
  return int(match[1]) if match else None


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
    trained = "; ".join(f"{name} {_model(own['model'])}" for name, own in config.get("students", {}).items())
    facts.append(
      f"{config['method']} · {trained or _model(config['model'])} · {config['data']['source']} · "
      f"batch {config['batch_size']} · {config['duration']} · seed {config['seed']}"
    )
  if metrics:
    of = "" if _total(config) is None else f" of {_total(config)}"
    facts.append(f"last recorded step: {int(max(line['step'] for line in metrics))}{of}")
  steps, seconds = curve(timing, "step_seconds")
  if len(steps):
    windows = np.diff(steps, prepend=0)
    rate = np.median(curve(timing, "images_per_second")[1])
    facts.append(f"training time: {duration(float(np.sum(windows * seconds)))}, median {rate:.0f} images/s")
  return "  \n".join(facts)


def _model(model: Mapping) -> str:
  """The named model, and what of it was changed: "dinov3_vits16 with depth=2, rope.base=50.0"."""
  plain = configs.flatten(configs.default().model)
  changed = [
    f"{key}={'x'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
    for key, value in _flat(model).items()
    if key not in _NO_ARCHITECTURE and value is not None and value != plain.get(key)
  ]
  return f"{model['name']} with {', '.join(changed)}" if changed else model["name"]


def _flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return flat


def _reason(ended: BaseException | None) -> str:
  """What ended the run, if that was not its end."""
  if ended is None:
    return ""
  if isinstance(ended, Stopped | KeyboardInterrupt):
    return "Stopped on request; the same command goes on."
  text = " ".join(str(ended).split())
  return f"**Ended by an error**: {text[:_LONGEST]}{' …' if len(text) > _LONGEST else ''}"


def _collapse(metrics: Lines, config: Mapping) -> str:
  """A word about features that are the same for every image at the end of what is recorded."""
  fallen, spread = [], False
  for name, (small, large) in SPREADS.items():
    _, values = curve(metrics, name)
    if len(values):
      now = float(np.mean(values[-max(1, len(values) // 10) :]))
      spread |= bool(np.nanmax(values, initial=-np.inf) > large)
      fallen += [f"`{name}` {now:.3g}"] if now < small else []
  if not fallen:
    return ""
  if spread:
    return f"**Collapsed**: the teacher gives every image nearly the same feature ({', '.join(fallen)})."
  total, reached = _total(config), max(line["step"] for line in metrics)
  if total is not None and reached < SETTLED * total:
    return ""  # features of an untrained network are all alike, and spread slowly
  return (
    f"**Not learned**: the teacher gives every image nearly the same feature, as untrained ({', '.join(fallen)}): the "
    "run was too short, or has collapsed."
  )


def _score_table(metrics: Lines, baselines: Mapping[str, float], kept: set[int], config: Mapping) -> str:
  rows, notes = [], []
  names = {name for line in metrics for name in line}
  wanted, smallest = _kept_by(config)
  labels = {"knn/top1": "k-NN top-1", "linear/top1": "linear probe top-1"}
  for name, label in ({wanted: f"`{wanted}`"} | labels if wanted else labels).items():
    steps, values = curve(metrics, name)
    if len(values):
      label += "" if neighbours(names, name) is None else f" (k = {neighbours(names, name)})"
      best, value = _best(steps, values, smallest=smallest and name == wanted)
      rows.append(f"| {label} | **{values[-1]:.1%}** | {value:.1%} (step {best}) |")
      if best and best not in kept:
        notes.append(f"Step {best}, the best by {label}, is not kept as a checkpoint.")
      elif best:
        notes.append(f"Step {best}, the best by {label}: `{checkpoints.FOLDER}/{best}`.")
  if not rows:
    return ""
  for name, value in baselines.items():
    rows.append(f"| {name}{'' if name == _BASELINES['majority'] else ' (k-NN)'} | {value:.1%} | |")
  head = ["## Accuracy on frozen features", "", "| | at the end | best |", "|---|---|---|"]
  return "\n".join([*head, *rows, "", "  \n".join(notes)]).rstrip()


def _kept_by(config: Mapping) -> tuple[str | None, bool]:
  """The score by which a step is kept as the best, without a student's name; and whether the smallest is."""
  settings = config.get("checkpoint", {})
  wanted = settings.get("keep_best")
  if wanted is None and (tasks := config.get("evaluation", {}).get("tasks")):
    wanted = f"{tasks[0]}/top1"
  student, _, rest = (wanted or "").partition("/")
  wanted = rest if student in config.get("students", ()) else wanted
  return None if wanted == "off" else wanted, settings.get("keep_best_mode") == "min"


def _best(steps: np.ndarray, values: np.ndarray, *, smallest: bool = False) -> tuple[int, float]:
  """The step with the best value, and the value; the untrained model of step 0 only if there is no other."""
  trained = steps > 0
  if np.isfinite(values[trained]).any():
    steps, values = steps[trained], values[trained]
  best = int(np.argmax(np.where(np.isfinite(values), -values if smallest else values, -np.inf)))
  return int(steps[best]), float(values[best])


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
