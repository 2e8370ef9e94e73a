"""A frozen encoder for latent diffusion: principal components of image patches, in closed form.

Latent diffusion (Rombach et al., arXiv 2112.10752) trains in the space of an autoencoder that no
longer changes. For images of 8 by 8 pixels the best linear autoencoder of patches is enough, and
that one needs no training: its weights are eigenvectors. Within the stack they are `Frozen`, which
`LayerStack(trainable=TRAINABLE)` leaves alone.

Dims: B images, H pixels along a side, K along the side of a patch, N = (H / K)^2 patches, C
channels of a latent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

Floats = npt.NDArray[np.floating[Any]]


class Frozen(nnx.Param[jax.Array]):
  """Weights that nothing changes."""


TRAINABLE = nnx.All(nnx.Param, nnx.Not(Frozen))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchCodec:
  """The weights of the autoencoder; the same for all patches, as in a convolution of stride K.

  Attributes:
    basis_KC: [K*K, C], pixels of a patch to channels; channels have variance 1 over the images
      that it was fitted to.
    inverse_CK: [C, K*K], back again.
    mean_K: [K*K], the mean patch.
  """

  basis_KC: Floats
  inverse_CK: Floats
  mean_K: Floats

  @classmethod
  def fit(cls, images_BHH: Floats, patch: int, channels: int) -> PatchCodec:
    """Finds the directions of largest variance among all patches.

    Args:
      images_BHH: float [B, H, H].
      patch: K.
      channels: C.

    Raises:
      ValueError: patches that do not tile the images, or more channels than a patch has pixels.
    """
    side = images_BHH.shape[1]
    if side % patch or not 1 <= channels <= patch**2:
      raise ValueError(
        f"patches of {patch}x{patch} with {channels} channels do not fit images of {side}x{side};"
        f" use a divisor of {side} and 1 to {patch**2} channels"
      )
    patches_K = to_patches(images_BHH, patch).reshape(-1, patch**2)
    mean_K = patches_K.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(patches_K, rowvar=False))
    kept = np.argsort(-variances)[:channels]
    scale_C, vectors = np.sqrt(variances[kept]), vectors[:, kept]
    return cls(basis_KC=vectors / scale_C, inverse_CK=(vectors * scale_C).T, mean_K=mean_K)

  @property
  def patch(self) -> int:
    """K."""
    return int(np.sqrt(len(self.mean_K)))

  @property
  def channels(self) -> int:
    """C."""
    return self.basis_KC.shape[1]

  def encode(self, images_BHH: Floats) -> Floats:
    """Latents [B, N, C] of images, outside any stack."""
    latents: Floats = (to_patches(images_BHH, self.patch) - self.mean_K) @ self.basis_KC
    return latents

  def decode(self, latents_BNC: Floats) -> Floats:
    """Images [B, H, H] of latents."""
    return from_patches(latents_BNC @ self.inverse_CK + self.mean_K, self.patch)


class Encoder(nnx.Module):
  """The codec's encoding half as a module: images [B, H, H] -> latents [B, N, C]."""

  def __init__(self, codec: PatchCodec, dtype: Any):
    self.patch = codec.patch
    self.basis = Frozen(jnp.asarray(codec.basis_KC, dtype))
    self.mean = Frozen(jnp.asarray(codec.mean_K, dtype))

  def __call__(self, images_BHH: jax.Array) -> jax.Array:
    patches_BNK = to_patches(images_BHH, self.patch).astype(self.mean[...].dtype)
    return (patches_BNK - self.mean[...][None, None]) @ self.basis[...]


def to_patches(images_BHH: Any, patch: int) -> Any:
  """[B, H, H] -> [B, N, K*K], row by row; arrays of NumPy or JAX."""
  rows, side, _ = images_BHH.shape
  n = side // patch
  cut = images_BHH.reshape(rows, n, patch, n, patch).swapaxes(2, 3)
  return cut.reshape(rows, n * n, patch * patch)


def from_patches(patches_BNK: Any, patch: int) -> Any:
  """Transpose of `to_patches`."""
  rows, count, _ = patches_BNK.shape
  n = int(np.sqrt(count))
  grid = patches_BNK.reshape(rows, n, n, patch, patch).swapaxes(2, 3)
  return grid.reshape(rows, n * patch, n * patch)
