"""The frozen encoder: lossless with all channels, white, and the best of its rank."""

import numpy as np
import pytest

from jaxpipe.models.diffusion.patch_codec import PatchCodec, from_patches, to_patches

IMAGES = np.cumsum(np.random.default_rng(0).standard_normal((50, 8, 8)), axis=1)


def test_patches_are_cut_row_by_row_and_put_back():
  image = np.arange(16.0).reshape(1, 4, 4)
  np.testing.assert_array_equal(to_patches(image, 2)[0, 1], [2, 3, 6, 7])
  np.testing.assert_array_equal(from_patches(to_patches(IMAGES, 4), 4), IMAGES)


def test_all_channels_lose_nothing():
  codec = PatchCodec.fit(IMAGES, patch=2, channels=4)
  np.testing.assert_allclose(codec.decode(codec.encode(IMAGES)), IMAGES, atol=1e-9)


def test_channels_are_white():
  codec = PatchCodec.fit(IMAGES, patch=2, channels=3)
  latents = codec.encode(IMAGES).reshape(-1, 3)
  np.testing.assert_allclose(np.cov(latents, rowvar=False), np.eye(3), atol=1e-9)
  np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-9)


def test_no_other_projection_of_that_rank_loses_less():
  codec = PatchCodec.fit(IMAGES, patch=2, channels=2)
  patches = to_patches(IMAGES, 2).reshape(-1, 4)
  singular = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)
  loss = ((codec.decode(codec.encode(IMAGES)) - IMAGES) ** 2).sum()
  np.testing.assert_allclose(loss, (singular[2:] ** 2).sum(), rtol=1e-9)


def test_patches_that_do_not_fit():
  with pytest.raises(ValueError, match="patches of 3x3 with 2 channels do not fit images of 8x8"):
    PatchCodec.fit(IMAGES, patch=3, channels=2)
