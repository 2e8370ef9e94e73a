"""The one error type of `jaxpipe.data`, which all of its modules may import."""


class DataError(ValueError):
  """Data that cannot be trained on; the message names the file and what to do about it."""
