"""`tfds:name/split`: datasets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vit_jax.data.classes import FIELDS, Classes, classes_of
from vit_jax.data.decode import BadImage
from vit_jax.data.left_out import LeftOut, in_a_line
from vit_jax.data.record_labels import classes_of_records
from vit_jax.data.sources import split_options


class TfdsSource:
  """The records of one split of a prepared dataset; images are left encoded."""

  def __init__(
    self, records: Any, spec: str, image_key: str, label_key: str | None, classes: Classes, left_out: LeftOut
  ):
    self._records = records
    self._spec = spec
    self._image_key = image_key
    self._label_key = label_key
    self._classes = classes
    self.left_out = left_out
    self.class_names = classes.names
    self.num_classes = len(classes.names)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, bytes | np.ndarray | int]:
    record = _record(self._records, index)
    label = -1 if self._label_key is None else self._classes.number(record[self._label_key])
    return {"image": record[self._image_key], "label": label}

  def describe(self, index: int) -> str:
    return f"record {index} of {self._spec}"


def _record(records: Any, index: int) -> dict[str, Any]:
  try:
    return records[index]
  except OSError as error:
    if error.errno is not None:
      raise
    raise BadImage(f"record {index}", f"cannot be read ({in_a_line(error)})") from error
  except Exception as error:  # a damaged chunk of the file, or what is no record of these features
    raise BadImage(f"record {index}", f"cannot be read ({in_a_line(error)})") from error


def open_tfds(rest: str, spec: str, *, cache_dir: str | os.PathLike | None = None) -> TfdsSource:
  """Opens `name[/config][:version]/split[?data_dir=/path]`; name may be the path of a prepared dataset's folder.

  The image is the feature "image", or else the first image feature, or else the first tensor [H, W, C]; the label
  "label" among the class labels, or else the first class label, or else a number or text of the name of one.

  Raises:
    ValueError: if the dataset or split is not there, is not prepared for random access, or has no image.
    ImportError: if tensorflow_datasets is not installed.
  """
  tfds, builder, split = _builder(rest, spec)
  if split not in builder.info.splits:
    if not builder.info.splits:
      raise ValueError(f"data.source = {spec!r}: {builder.data_path} is not prepared; {_how_to_prepare(rest)}")
    known = ", ".join(builder.info.splits)
    raise ValueError(f"data.source = {spec!r}: {builder.data_path} has no split {split!r}; its splits: {known}.")
  features = dict(builder.info.features)
  images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
  labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
  encoded = bool(images)
  images = images or [key for key, feature in features.items() if len(getattr(feature, "shape", None) or ()) == 3]
  if not images:
    raise ValueError(f"data.source = {spec!r} has no image among its features: {', '.join(features)}.")
  image_key = "image" if "image" in images else images[0]
  others = [key for key in FIELDS if key in features and key not in images and not features[key].shape]
  label_key = "label" if "label" in labels else next(iter(labels or others), None)
  try:
    records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()} if encoded else None)
  except NotImplementedError as error:
    raise ValueError(
      f"data.source = {spec!r}: {builder.data_path} is stored as {builder.info.file_format.value}, which has no random "
      "access; prepare it again with file_format='array_record'."
    ) from error
  classes, left_out = classes_of(()), LeftOut()
  if labels and features[label_key].names:
    classes = classes_of((), features[label_key].names)
  elif label_key is not None:
    files = [str(file) for file in builder.info.splits[split].filepaths]
    classes, left_out = classes_of_records(
      lambda index: _record(records, index)[label_key], len(records), files, cache_dir=cache_dir
    )
  return TfdsSource(records, spec, image_key, label_key, classes, left_out)


def _how_to_prepare(rest: str) -> str:
  body, options = split_options(rest)
  where = f", data_dir={options['data_dir']!r}" if "data_dir" in options else ""
  return (
    "prepare it once, where TensorFlow is installed, in Python: import tensorflow_datasets as tfds; "
    f"tfds.builder({body.rpartition('/')[0]!r}{where}, file_format='array_record').download_and_prepare()"
  )


def prepared_splits(rest: str, spec: str) -> list[str]:
  """The splits of the dataset that `name/split` speaks of."""
  return list(_builder(rest, spec)[1].info.splits)


def _builder(rest: str, spec: str) -> tuple[Any, Any, str]:
  """(the tensorflow_datasets module, the dataset's builder, the split's name)."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
      f"data.source = {spec!r} needs the package tensorflow-datasets: pip install tensorflow-datasets"
    ) from error
  body, options = split_options(rest)
  name, slash, split = body.rpartition("/")
  if not slash or not name or not split:
    raise ValueError(f"data.source = {spec!r} must be tfds:name/split, such as tfds:imagenet2012/train.")
  unknown = set(options) - {"data_dir"}
  if unknown:
    raise ValueError(f"data.source = {spec!r}: unknown option {', '.join(sorted(unknown))}; valid: data_dir.")
  data_dir = options.get("data_dir")
  try:
    if os.path.isdir(os.path.expanduser(name)):
      builder = tfds.builder_from_directory(os.path.expanduser(name))
    else:
      builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.registered.DatasetNotFoundError as error:
    root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    prepared = sorted(entry for entry in os.listdir(root) if entry != "downloads") if os.path.isdir(root) else []
    found = f"{root} holds {', '.join(prepared)}" if prepared else f"{root} holds none"
    raise ValueError(
      f"data.source = {spec!r}: there is no dataset {name!r}; {found} (choose with ?data_dir=/path)."
    ) from error
  except Exception as error:  # what tfds raises on a damaged description of a dataset
    raise ValueError(
      f"data.source = {spec!r}: {name} cannot be opened ({in_a_line(error)}); prepare it again."
    ) from error
  return tfds, builder, split
