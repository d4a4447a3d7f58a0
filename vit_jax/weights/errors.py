"""What can be wrong with weights; the messages are for users."""


class WeightsError(ValueError):
  """A weight file that cannot be read, or a model that a format cannot hold."""


class WeightMismatch(WeightsError):
  """Weights do not fit a model; the message lists every tensor that does not."""
