"""Log-mel spectrograms of 8 kHz speech, in NumPy.

The energies of 25 ms windows, 10 ms apart, in bands that are as wide as the ear's: equally wide in
mel, which is 2595 log10(1 + f / 700).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RATE = 8000
WINDOW, HOP, FOURIER = 200, 80, 256
BANDS = 32
_QUIET = 1e-5  # added to energies: about the noise of 8-bit mu-law


def log_mel(wave: Array) -> Array:
  """Spectrograms of waves that are equally long.

  Args:
    wave: float [..., samples] in [-1, 1], samples a multiple of HOP.

  Returns:
    float32 [..., samples / HOP, BANDS], about zero mean and unit variance for speech.
  """
  frames = wave.shape[-1] // HOP
  padded = np.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(0, WINDOW - HOP)])
  views = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=-1)
  cut = views[..., ::HOP, :][..., :frames, :] * np.hanning(WINDOW)
  energies = np.abs(np.fft.rfft(cut, FOURIER)) ** 2
  logs = np.log(energies @ filters() + _QUIET)
  return ((logs + 4) / 4).astype(np.float32)


@functools.cache
def filters() -> Array:
  """Triangles of equal width in mel from 60 Hz to half the rate, [FOURIER / 2 + 1, BANDS]."""
  mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
  corners = np.linspace(mel(60.0), mel(RATE / 2), BANDS + 2)
  at = mel(np.fft.rfftfreq(FOURIER, 1 / RATE))[:, None]
  left, peak, right = corners[:-2], corners[1:-1], corners[2:]
  rising, falling = (at - left) / (peak - left), (right - at) / (right - peak)
  return np.maximum(0, np.minimum(rising, falling))
