"""Shapes of known models: as many parameters as their checkpoints have."""

import math

import jax
import pytest

from jaxpipe.models.huggingface.config import kind_of, to_json
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.models.transformer.presets import PRESETS, find_preset

# Of checkpoints: what the safetensors on the hub sum to, a tied table counted once.
PARAMETERS = {
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-7b": 7_615_616_512,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "mixtral-8x7b": 46_702_792_704,
}
# Of papers, in this transformer's own architecture; in billions.
SIZES = {"gpipe-6b": 6.6, "gpt3-175b": 174.6, "megatron-1t": 1009.3, "deepseek-v3": 733.3}


def count(name):
  shapes = transformer(PRESETS[name]).param_shapes()
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_checkpoint(name):
  assert count(name) == PARAMETERS[name]
  kind = {"gpt2": "gpt2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
  wanted = kind.get(name.partition("-")[0].partition(".")[0], "mixtral")
  assert kind_of(PRESETS[name]) == wanted
  assert to_json(PRESETS[name], 1)["vocab_size"] == PRESETS[name].vocabulary_size


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_papers(name):
  assert round(count(name) / 1e9, 1) == SIZES[name]


def test_every_preset_has_its_size_here():
  assert {*PARAMETERS, *SIZES, "tiny"} == set(PRESETS)


def test_an_unknown_name_brings_the_nearest():
  with pytest.raises(ValueError, match=r"'gpt-2' is unknown; did you mean gpt2\?"):
    find_preset("gpt-2")
  with pytest.raises(ValueError, match=r"'zzz' is unknown; known: tiny, gpt2,"):
    find_preset("zzz")
