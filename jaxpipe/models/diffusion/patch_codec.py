"""A frozen encoder for latent diffusion: principal components of image patches, in closed form.

Latent diffusion (Rombach et al., arXiv 2112.10752) trains in the space of an autoencoder that no
longer changes. For images of 8 by 8 pixels the best linear autoencoder of patches is enough, and
that one needs no training: its weights are eigenvectors of the patches' covariance. Within the
stack they are variables of type `Frozen`, which `LayerStack(trainable=TRAINABLE)` counts as model
state.

Dims: B images, H pixels along a side, K along the side of a patch, N = (H / K)^2 patches, C
channels of a latent. In names of arrays, a suffix K stands for the K * K pixels of a patch.
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
  """Weights that no step changes."""


# The filter of a stack's parameters: all of them but the frozen ones.
TRAINABLE = nnx.All(nnx.Param, nnx.Not(Frozen))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchCodec:
  """The weights of the autoencoder, the same for all patches, as in a convolution of stride K.

  Attributes:
    basis_KC: [K*K, C], from pixels of a patch to channels; channels have variance 1 over the images
      that the codec was fitted to.
    inverse_CK: [C, K*K], from channels to pixels.
    mean_K: [K*K], the mean patch, which is subtracted first.
  """

  basis_KC: Floats
  inverse_CK: Floats
  mean_K: Floats

  @classmethod
  def fit(cls, images_BHH: Floats, patch: int, channels: int) -> PatchCodec:
    """Fits a codec to images: the directions of largest variance among all their patches.

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
    """K, the side of a patch in pixels."""
    return int(np.sqrt(len(self.mean_K)))

  @property
  def channels(self) -> int:
    """C, the channels of a latent."""
    return self.basis_KC.shape[1]

  def encode(self, images_BHH: Floats) -> Floats:
    """Encodes images [B, H, H] into latents [B, N, C], in NumPy, outside any stack."""
    latents: Floats = (to_patches(images_BHH, self.patch) - self.mean_K) @ self.basis_KC
    return latents

  def decode(self, latents_BNC: Floats) -> Floats:
    """Decodes latents [B, N, C] into images [B, H, H]."""
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
  """Cuts images into patches, row by row: [B, H, H] -> [B, N, K*K]; arrays of NumPy or JAX."""
  rows, side, _ = images_BHH.shape
  n = side // patch
  cut = images_BHH.reshape(rows, n, patch, n, patch).swapaxes(2, 3)
  return cut.reshape(rows, n * n, patch * patch)


def from_patches(patches_BNK: Any, patch: int) -> Any:
  """Joins patches to images, the inverse of `to_patches`: [B, N, K*K] -> [B, H, H]."""
  rows, count, _ = patches_BNK.shape
  n = int(np.sqrt(count))
  grid = patches_BNK.reshape(rows, n, n, patch, patch).swapaxes(2, 3)
  return grid.reshape(rows, n * patch, n * patch)
