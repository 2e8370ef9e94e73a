"""Log-mel spectrograms of 8 kHz speech, in NumPy.

A spectrogram has the logarithms of the energies of 25 ms windows, one every 10 ms, in bands of
equal width in mel, 2595 log10(1 + f / 700), a scale on which the ear resolves frequencies evenly.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RATE = 8000
WINDOW, HOP, FOURIER = 200, 80, 256  # samples: 25 ms, 10 ms, and points of the Fourier transform
BANDS = 32
_QUIET = 1e-5  # added to energies: about the noise of 8-bit mu-law


def log_mel(wave: Array) -> Array:
  """Computes the spectrograms of waves that are equally long.

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
  """Returns the bands' weights of frequencies, [FOURIER / 2 + 1, BANDS].

  They are triangles of equal width in mel, from 60 Hz to half the sampling rate.
  """
  corners = np.linspace(_mel(60.0), _mel(RATE / 2), BANDS + 2)
  at = _mel(np.fft.rfftfreq(FOURIER, 1 / RATE))[:, None]
  left, peak, right = corners[:-2], corners[1:-1], corners[2:]
  rising, falling = (at - left) / (peak - left), (right - at) / (right - peak)
  return np.maximum(0, np.minimum(rising, falling))


def _mel(frequency: Any) -> Any:
  """Converts frequencies in Hz to mel."""
  return 2595 * np.log10(1 + frequency / 700)
