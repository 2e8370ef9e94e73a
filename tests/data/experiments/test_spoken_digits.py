"""Spectrograms of tones, and utterances as a pure function of (seed, step)."""

import pathlib

import numpy as np
import pytest

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.log_mel import BANDS, HOP, RATE, filters, log_mel
from jaxpipe.data.experiments.spoken_digits import SpokenDigits, load_spoken_digits

CLIPS = pathlib.Path(__file__).parents[3] / "data" / "spoken_digits" / "digits.npz"


@pytest.mark.parametrize("frequency", [300, 1000, 3000])
def test_a_tone_is_loudest_in_its_own_band(frequency):
  wave = np.sin(2 * np.pi * frequency * np.arange(10 * HOP) / RATE)
  mels = log_mel(wave)
  band = filters()[round(frequency * 256 / RATE)].argmax()
  assert mels.shape == (10, BANDS) and mels.dtype == np.float32
  assert (np.abs(mels[2:8].argmax(axis=1) - band) <= 1).all()


@pytest.fixture(scope="module")
def digits():
  return load_spoken_digits(CLIPS)


def test_the_clips_that_ship(digits):
  assert [len(clips) for clips in digits.clips] == [10] * 48
  loudness = [np.sqrt(np.mean(clip**2)) for clips in digits.clips for clip in clips]
  np.testing.assert_allclose(loudness, 0.1, rtol=0.15)  # some peaks are clipped


def test_an_utterance_is_a_function_of_seed_and_step(digits):
  one, other = digits.batch(4, 0, 7, 160), digits.batch(4, 0, 7, 160)
  assert all((one[name] == other[name]).all() for name in one)
  for changed in (digits.batch(4, 1, 7, 160), digits.batch(4, 0, 8, 160)):
    assert (one["mels"] != changed["mels"]).any()
  assert (one["mels"] != digits.batch(4, 0, 7, 160, held_out=True)["mels"]).any()


def test_labels_say_whose_clips_were_put_together():
  # A clip of digit d is 100 (d + 1) samples long, and 10 frames hold them all but pauses.
  clips = [[np.full(100 * (d + 1), 0.5, np.float32) for d in range(10)]] * 13
  batch = SpokenDigits(clips, "").batch(50, 0, 0, 80)
  assert ((batch["labels"] > 0).sum(axis=1) >= 1).all() and batch["labels"].max() <= 10
  least = (batch["labels"] * 100).sum(axis=1) - 160 * 3  # pauses may overlap by 20 ms
  assert (batch["frames"] * HOP >= least).all() and (batch["frames"] <= 80).all()


def test_what_does_not_fit_is_not_said():
  clips = [[np.ones(900, np.float32)] * 10] * 13
  batch = SpokenDigits(clips, "").batch(50, 0, 0, 25)  # 2,000 samples: two clips at most
  assert (batch["labels"] > 0).sum(axis=1).max() == 2


def test_another_file_is_refused(tmp_path):
  with pytest.raises(DataError, match="cannot be read as spoken digits"):
    load_spoken_digits(tmp_path / "none.npz")
