"""Small files on disk: written whole or not at all, read with words for what is damaged. Imports nothing of vit_jax."""

from vit_jax.files.jsons import DamagedFile, Lines, parse_json, read_json, read_json_lines
from vit_jax.files.writing import append, write_bytes, write_json, write_text

__all__ = [
  "DamagedFile",
  "Lines",
  "append",
  "parse_json",
  "read_json",
  "read_json_lines",
  "write_bytes",
  "write_json",
  "write_text",
]
