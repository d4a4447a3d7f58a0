"""Import and export of published weights: strict in both directions.

`from_state_dict` and `to_state_dict` convert between names → arrays of a published layout and parameter trees, one
tensor at a time where they are lazy; `files` reads and writes safetensors, `pth` PyTorch's files; `hf_config` and
`infer` say which architecture a file holds.
"""

from vit_jax.weights.convert import (
  LAYOUTS,
  check_parameters,
  from_state_dict,
  lazy_state_dict,
  parameter_shapes,
  select,
  to_state_dict,
)
from vit_jax.weights.errors import WeightMismatch, WeightsError

__all__ = [
  "LAYOUTS",
  "WeightMismatch",
  "WeightsError",
  "check_parameters",
  "from_state_dict",
  "lazy_state_dict",
  "parameter_shapes",
  "select",
  "to_state_dict",
]
