"""What files that are no images may be, and how they are read, if they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from vit_jax.data.formats import BMP, EXTENSIONS, PNM, Format, format_of

_VIDEOS = "videos are not read: write their frames as images"
_PACKED = "packed files are not read: unpack them"
_ARRAYS = "not read: write each image as .npy, PNG or TIFF"
_OTHER_IMAGES = "not a format that is read: write them as PNG or TIFF"
_SHARDS = (  # (of a name, scheme of the source that reads them, what ends the pattern of their names)
  (r"\.(array_?record|riegeli)(-\d+-of-\d+)?", "array_record", "array_record*"),
  (r"\.parquet", "parquet", "parquet"),
  (r"\.tar", "tar", "tar"),
)
_KINDS = (
  *((pattern, f"shards: read as {scheme}:FOLDER/*.{rest}") for pattern, scheme, rest in _SHARDS),
  (r"\.tfrecords?(-\d+-of-\d+)?", "not read: prepare them with file_format='array_record', and read them as tfds:"),
  (r"(idx\d-)?ubyte(\.gz)?|\.idx\d?(\.gz)?", "idx files, as of MNIST, are not read: write each image as .npy or PNG"),
  (r"\.(mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv|3gp|ogv|mts|m2ts|gifv)", _VIDEOS),
  (r"\.(zip|gz|tgz|bz2|xz|zst|7z|rar|tbz2?|txz)", _PACKED),
  (r"\.(npz|h5|hdf5|mat|mdb|lmdb|zarr|pkl|pickle|pt|pth|safetensors|arrow|feather|beton)", _ARRAYS),
  (r"\.(dcm|nii|nrrd|mha|mhd|svs|ndpi|czi|lif|vsi|scn)", _OTHER_IMAGES),
  (r"\.(cr[23w]|nef|arw|dng|orf|rw2|raf|pef|srw)", "raw photographs are not read: develop them"),
  (r"\.(jxl|exr|hdr|psd|ico|icns|tga|dds|pcx|sgi|svg|eps|ps|pdf|wmf|emf|qoi|jxr|bpg|xcf|fits?|pam|pfm)", _OTHER_IMAGES),
)
# What lies beside images as a rule.
_USUAL = {".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".htm", ".yaml", ".yml", ".log", ".db",
          ".ini", ".py", ".ipynb", ".sh", ".cls", ".sha256", ".md5", ".toml", ".cfg", ".srt", ".vtt",
          ".caption", ".tags", ".bib", ".rst", ".url", ".lnk", ".vit_jax_index", ".index"}  # fmt: skip
_ENDINGS = frozenset(EXTENSIONS)
_FORMAT_NAME = re.compile(r"\.[a-z][a-z0-9]{0,9}")
_LONGEST = 16  # characters of an ending


def is_image(name: str) -> bool:
  """Whether a file is taken for an image by the ending of its name."""
  return os.path.splitext(name)[1].lower() in _ENDINGS


def may_be_image(name: str) -> bool:
  """Whether only its content can tell: its name ends in that of no format, as `photo.jpg_large` or `2024.01.02`."""
  ending = os.path.splitext(name)[1].lower()
  return not _FORMAT_NAME.fullmatch(ending)


def told_by(start: bytes) -> Format | None:
  """The format that the first bytes of a file without a telling name are of, if they leave no doubt."""
  found = format_of(start)
  return None if found in (BMP, PNM) else found  # two letters begin many a text


def reason(name: str) -> tuple[str, bool]:
  """(why a file that is no image is left out, whether such files lie beside images as a rule)."""
  ending = os.path.splitext(name)[1].lower()
  if ending in _USUAL:
    return ending, True
  ending = re.sub(r"-\d+-of-\d+$", "", ending)
  shown = (ending if len(ending) <= _LONGEST and ending.isprintable() else "another ending") or "no extension"
  for pattern, what in _KINDS:
    if re.search(rf"{pattern}$", name, re.IGNORECASE):
      return f"{shown}: {what}", False
  return shown, False


def did_you_mean(folder: str, names: Iterable[str]) -> str:
  """The source that reads the files of a folder in which there is no image, as a question; "" if there is none."""
  for name in names:
    for pattern, scheme, rest in _SHARDS:
      if not re.search(rf"{pattern}$", name, re.IGNORECASE):
        continue
      place = os.path.join(folder, os.path.dirname(name)).rstrip("/")
      prepared = re.fullmatch(r".*-(\w+)\.array_record-\d+-of-\d+", name)
      if prepared and os.path.exists(os.path.join(place, "dataset_info.json")):
        return f" Did you mean tfds:{place}/{prepared[1]}?"
      return f" Did you mean {scheme}:{place}/*.{rest}?"
  return ""


def no_match(pattern: str) -> str:
  """The pattern of shards that one which matches nothing may be meant as, as a question: they lie in a folder of it."""
  folder = os.path.expanduser(pattern)
  folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
  try:
    return did_you_mean(folder, sorted(os.listdir(folder)))
  except OSError:
    return ""


def spec_of_path(path: str) -> str:
  """The specification that a path without scheme may be meant as."""
  for pattern, scheme, _ in _SHARDS:
    if re.search(rf"{pattern}$", path, re.IGNORECASE):
      return f"{scheme}:{path}"
  return f"folder:{path}"
