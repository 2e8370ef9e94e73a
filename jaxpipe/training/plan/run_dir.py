"""The directory of a run: its files, and what must agree before a run may be resumed in it.

config.json     marks the directory as a run's: its flags, and the identity of its data
tokenizer.json  of a run with byte-pair encoding, so that sampling needs no text
checkpoints/    see `loop/checkpoint.py`
metrics.jsonl   a line for each step, see `loop/metrics.py`
events.out.tfevents.*  timetable.png  loss.png  profile/
.lock           held by the process that trains here
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Generic, TypeVar

from jaxpipe.data import BpeTokenizer, ByteTokenizer, Tokenizer, load_bpe
from jaxpipe.data.files import atomic_file
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.run_config import RunConfig
from jaxpipe.training.flags.settings import show_flag

Kind = TypeVar("Kind", bound=RunConfig)

_MARK = "jaxpipe run 1"
_OTHER = "or use another --run_dir"
_SHARED_WITHIN = 10.0  # seconds; network file systems may show new files late
_HELD: dict[pathlib.Path, IO[bytes]] = {}  # locked until the process ends, however it ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord(Generic[Kind]):
  """The contents of `config.json`.

  Attributes:
    config: the flags of the command that began the run, or last resumed it.
    data: JSON values that mark what it trains on, such as `TokenBatches.identity`.
  """

  config: Kind
  data: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunDir:
  """A run directory: the paths in it, and its record.

  Attributes:
    path: the directory, which need not exist yet.
  """

  path: pathlib.Path

  @property
  def checkpoints(self) -> pathlib.Path:
    """The folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    """The file with a JSON object for each step."""
    return self.path / "metrics.jsonl"

  @property
  def loss_png(self) -> pathlib.Path:
    """The picture of the loss curve."""
    return self.path / "loss.png"

  @property
  def profile(self) -> pathlib.Path:
    """The folder of the profiler's traces."""
    return self.path / "profile"

  @property
  def _config(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def _tokenizer(self) -> pathlib.Path:
    return self.path / "tokenizer.json"

  def read(self, kind: type[Kind]) -> RunRecord[Kind] | None:
    """Returns the record, or None where no run has begun.

    Args:
      kind: of the configuration that a run there should have.

    Raises:
      ConfigError: something else is there: not a folder, other files, a damaged record, or a run of
        another experiment.
    """
    if not self.path.exists():
      return None
    if not self.path.is_dir():
      raise ConfigError(f"--run_dir={self.path}: is a file, not a folder; use another --run_dir")
    if not self._config.exists():
      # A run killed while it wrote its record leaves a hidden file, which is no reason to refuse.
      if all(entry.name.startswith(".") for entry in self.path.iterdir()):
        return None
      raise ConfigError(
        f"--run_dir={self.path}: not empty and not a jaxpipe run (no config.json);"
        " use another --run_dir"
      )
    return _parse(self._config, kind)

  def begin(self, record: RunRecord[Any], tokenizer: Tokenizer | None = None) -> None:
    """Makes the folder ours; the record comes last, since it is what marks it.

    Args:
      record: to be written.
      tokenizer: of the run, if it has one; bytes need no file.
    """
    # In this order, since a run may be killed between any two lines: config.json, which marks the
    # directory as a run's, appears only once all that it names is there.
    self.path.mkdir(parents=True, exist_ok=True)
    _hold(self.path)
    if isinstance(tokenizer, BpeTokenizer):
      with atomic_file(self._tokenizer) as file:
        file.write(tokenizer.to_json().encode())
    config = record.config
    fields = {
      "format": _MARK,
      "experiment": type(config).__name__,
      "config": config.to_dict(),
      "data": record.data,
    }
    with atomic_file(self._config) as file:
      file.write((json.dumps(fields, indent=1) + "\n").encode())

  def check_shared(self) -> None:
    """Makes sure that this process sees the folder that process 0 has begun.

    Raises:
      ConfigError: it does not, some seconds later either.
    """
    end = time.monotonic() + _SHARED_WITHIN
    while not self._config.exists():
      if time.monotonic() > end:
        raise ConfigError(
          f"--run_dir={self.path}: does not show what process 0 wrote there; it must be one folder"
          " that all processes share"
        )
      time.sleep(0.1)

  def tokenizer(self) -> Tokenizer:
    """Returns the run's tokenizer, from the folder alone."""
    return load_bpe(self._tokenizer) if self._tokenizer.exists() else ByteTokenizer()


def _hold(path: pathlib.Path) -> None:
  """Locks the folder for this process: two that train in one would undo each other's files.

  Raises:
    ConfigError: another process has it.
  """
  name = path.resolve()
  if name in _HELD:
    return
  file = (path / ".lock").open("ab")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise ConfigError(
      f"--run_dir={path}: another process is training there; wait for it, {_OTHER}"
    ) from None
  _HELD[name] = file


def check_config(path: pathlib.Path, record: RunRecord[Kind], config: Kind) -> None:
  """Refuses to resume with other flags where these would train another model.

  Args:
    path: the run directory.
    record: that is in it.
    config: the flags of the command that is to resume it.

  Raises:
    ConfigError: names the first such flag, both values and what to do.
  """
  for field in dataclasses.fields(config):
    was, now = getattr(record.config, field.name), getattr(config, field.name)
    if was != now and not field.metadata["may_change"]:
      raise ConfigError(
        f"{show_flag(field.name, now)}: the run in {path} has {show_flag(field.name, was)};"
        f" repeat that to resume it, {_OTHER}"
      )


def check_data(
  path: pathlib.Path, record: RunRecord[Any], data: Mapping[str, Any], flag: Callable[[str], str]
) -> None:
  """Refuses to resume with other data than the run began with.

  Args:
    path: the run directory.
    record: that is in it.
    data: JSON values that mark the data now, as in the record.
    flag: `name -> flag`, as one would type it, that decides an entry of `data`.

  Raises:
    ConfigError: an entry of `data` is not the record's.
  """
  for name, now in data.items():
    # The path may differ, what the file holds may not.
    was = record.data.get(name)
    if was != now:
      raise ConfigError(
        f"{flag(name)}: its {name} is {_short(now)}, the run in {path} has {_short(was)};"
        f" give the same file to resume it, {_OTHER}"
      )


def _parse(path: pathlib.Path, kind: type[Kind]) -> RunRecord[Kind]:
  """Reads a record, and refuses one that is damaged or of another experiment."""
  try:
    fields = json.loads(path.read_text())
    mark = fields["format"]
    if mark != _MARK:
      raise ConfigError(f"{path}: format {mark!r}, not {_MARK!r}; use another --run_dir")
    # Runs that are older than the name were all of the language model.
    experiment = fields.get("experiment", "Config")
    if experiment != kind.__name__:
      raise ConfigError(
        f"{path}: a run of another experiment ({experiment}, not {kind.__name__}); use another"
        " --run_dir"
      )
    return RunRecord(config=kind.from_dict(fields["config"]), data=dict(fields["data"]))
  except ConfigError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path}: damaged ({error}); use another --run_dir") from None


def _short(value: Any) -> str:
  """The beginning of a value, which may be a long checksum."""
  return str(value)[:17]
