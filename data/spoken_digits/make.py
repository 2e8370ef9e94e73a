"""Speaks the digits: makes digits.npz with eSpeak NG (see README.md beside this file).

    pip install espeakng-loader==0.2.4 scipy && python data/spoken_digits/make.py

Every speaker is an accent of English, a voice, a speed and a pitch, drawn by a fixed seed; each
says the ten digits once. The clips are 8 kHz, cut to where there is sound, as loud as each other,
and stored as 8-bit mu-law.
"""

import ctypes
import itertools
import json
import pathlib

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029")
VOICES = (
  *(f"m{i}" for i in range(1, 9)),
  *(f"f{i}" for i in range(1, 6)),
  *("Andy", "Annie", "adam", "belinda", "linda", "john", "steph"),
)
SPEAKERS, SEED = 48, 0
SPEEDS, PITCHES = (190, 300), (30, 75)  # words a minute; eSpeak's own scale
RATE, SPOKEN_RATE = 8000, 22050
SYNCHRONOUS, SPEED, PITCH, UTF8 = 2, 1, 3, 1  # of speak_lib.h
CALLBACK = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speaker:
  """eSpeak NG as a function of text."""

  def __init__(self):
    self.library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    assert self.library.espeak_Initialize(SYNCHRONOUS, 0, data, 0) == SPOKEN_RATE
    self.pieces = []
    self.callback = CALLBACK(self.hear)  # kept, or it would be collected while the library has it
    self.library.espeak_SetSynthCallback(self.callback)

  def hear(self, wave, count, events):
    if wave and count > 0:
      self.pieces.append(ctypes.string_at(wave, 2 * count))
    return 0

  def say(self, word, voice, speed, pitch):
    """Samples in [-1, 1] at SPOKEN_RATE."""
    self.pieces.clear()
    if self.library.espeak_SetVoiceByName(voice.encode()):
      raise ValueError(f"no voice {voice}")
    self.library.espeak_SetParameter(SPEED, speed, 0)
    self.library.espeak_SetParameter(PITCH, pitch, 0)
    self.library.espeak_Synth(word.encode(), len(word) + 1, 0, 0, 0, UTF8, None, None)
    return np.frombuffer(b"".join(self.pieces), np.int16) / 2**15


def clip(wave):
  """The clip as stored: uint8 mu-law at RATE."""
  wave = resample_poly(wave, 160, 441)  # 22050 Hz to 8000 Hz
  loud = np.flatnonzero(np.abs(wave) > 0.01)
  wave = wave[loud[0] : loud[-1] + 1]
  wave = np.clip(0.1 * wave / np.sqrt(np.mean(wave**2)), -1, 1)
  pressed = np.sign(wave) * np.log1p(255 * np.abs(wave)) / np.log(256)
  return np.round(127.5 * (pressed + 1)).astype(np.uint8)


def main():
  """Writes digits.npz beside this file."""
  rng, speaker = np.random.default_rng(SEED), Speaker()
  pairs = list(itertools.product(ACCENTS, VOICES))
  clips, who = [], []
  for i in rng.permutation(len(pairs))[:SPEAKERS]:
    voice, speed, pitch = "+".join(pairs[i]), *(int(rng.integers(*r)) for r in (SPEEDS, PITCHES))
    clips += [clip(speaker.say(word, voice, speed, pitch)) for word in WORDS]
    who.append(f"{voice} {speed} {pitch}")
  ends = np.cumsum([len(one) for one in clips]).astype(np.int32)
  path = pathlib.Path(__file__).with_name("digits.npz")
  np.savez_compressed(path, wave=np.concatenate(clips), ends=ends, speakers=json.dumps(who))
  seconds = ends[-1] / RATE
  print(f"{path}: {len(who)} speakers, {seconds:.0f} s, longest {np.diff(ends).max() / RATE:.2f} s")


if __name__ == "__main__":
  main()
