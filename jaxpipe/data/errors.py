"""The one error type of this folder, apart so that every module can raise it without a cycle."""


class DataError(ValueError):
  """Data that cannot be trained on; the message names the file and what to do about it."""
