"""Makes utterances of several digits from the clips of single ones in data/spoken_digits.

An utterance is one speaker saying one to four digits with pauses between them, at some loudness and
in some noise. All of this is a pure function of (seed, step). Speakers who are held out are never
heard in training.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.log_mel import HOP, RATE, log_mel

Array = npt.NDArray[Any]
Batch = dict[str, Array]

DIGITS = 10
LONGEST = 4  # digits of an utterance
_HELD_OUT = 12  # speakers, the last ones
_LEAD, _PAUSE = (0.0, 0.1), (-0.02, 0.08)  # seconds before the first digit, and between two
_LOUDNESS, _NOISE = (0.5, 1.5), (-40.0, -20.0)  # a factor; dB against full scale


@dataclasses.dataclass(frozen=True, eq=False)
class SpokenDigits:
  """Clips of single digits, by speaker and digit.

  Attributes:
    clips: of every speaker ten waves, float32 [samples] in [-1, 1] at 8 kHz.
    checksum: CRC-32 of the clips, 8 hex digits.
  """

  clips: Sequence[Sequence[Array]]
  checksum: str

  def batch(
    self, batch_size: int, seed: int, step: int, frames: int, held_out: bool = False
  ) -> Batch:
    """Makes a batch of utterances, as spectrograms, with what is said in them.

    Args:
      batch_size: B.
      seed, step: with these equal, the batch is equal.
      frames: T, of 10 ms each; digits that would end later are not said.
      held_out: whether the speakers are those held out for measuring, or the others.

    Returns:
      mels float32 [B, T, BANDS], frames int32 [B] (of the utterance, without what fills up),
      labels int32 [B, LONGEST] (digit + 1; 0 fills up), weights float32 [B], all 1.
    """
    rng = np.random.default_rng([seed, step, held_out])
    speakers = self.clips[-_HELD_OUT:] if held_out else self.clips[:-_HELD_OUT]
    waves = np.zeros((batch_size, frames * HOP))
    spoken, labels = np.zeros(batch_size, np.int32), np.zeros((batch_size, LONGEST), np.int32)
    for row in range(batch_size):
      end, said = _speak(waves[row], speakers[int(rng.integers(len(speakers)))], rng)
      spoken[row] = -(-end // HOP)
      labels[row, : len(said)] = said
    waves *= rng.uniform(*_LOUDNESS, (batch_size, 1))
    waves += 10 ** (rng.uniform(*_NOISE, (batch_size, 1)) / 20) * rng.standard_normal(waves.shape)
    weights = np.ones(batch_size, np.float32)
    return {"mels": log_mel(waves), "frames": spoken, "labels": labels, "weights": weights}


def _speak(wave: Array, clips: Sequence[Array], rng: np.random.Generator) -> tuple[int, Array]:
  """Adds an utterance to `wave`; returns where it ends, in samples, and its labels."""
  wanted = rng.integers(DIGITS, size=rng.integers(1, LONGEST + 1))
  at, end, said = int(rng.uniform(*_LEAD) * RATE), 0, 0
  for digit in wanted:
    clip = clips[digit]
    if at + len(clip) > len(wave):
      break
    wave[at : at + len(clip)] += clip
    end, said = at + len(clip), said + 1
    at = end + int(rng.uniform(*_PAUSE) * RATE)
  return end, wanted[:said] + 1


def load_spoken_digits(path: pathlib.Path) -> SpokenDigits:
  """Reads `digits.npz`.

  Raises:
    DataError: not that file.
  """
  try:
    with np.load(path) as file:
      pressed, ends = file["wave"], file["ends"]
  except (OSError, KeyError, ValueError) as error:
    raise DataError(f"{path}: cannot be read as spoken digits ({error}); restore it") from None
  p = pressed.astype(np.float32) / 127.5 - 1
  wave = np.sign(p) * (256 ** np.abs(p) - 1) / 255
  clips = np.split(wave, ends[:-1])
  speakers = [clips[i : i + DIGITS] for i in range(0, len(clips), DIGITS)]
  return SpokenDigits(speakers, f"{zlib.crc32(pressed.tobytes()):08x}")
