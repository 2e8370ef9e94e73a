"""Makes the fixtures in this folder: tiny random models, and what `transformers` says of a batch.

    pip install torch transformers          # in an environment of its own; the tests need neither
    python tests/data/huggingface/make.py

A folder holds config.json and model.safetensors as `save_pretrained` writes them, and
expected.safetensors: tokens int32 [2, 12] and logits float32 [2, 12, V]. Weights are float32.
Sizes unlike each other show what is transposed or mixed up, and what begins at 0 or 1 (biases,
norms) is drawn at random, so that its place shows, too.
"""

import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
SHAPE = dict(vocab_size=54, hidden_size=16, num_hidden_layers=4, num_attention_heads=4)
GATED = dict(num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
MODELS = {
  "gpt2": (
    transformers.GPT2LMHeadModel,
    transformers.GPT2Config(vocab_size=54, n_embd=16, n_layer=4, n_head=4, n_positions=32),
  ),
  "llama": (
    transformers.LlamaForCausalLM,
    transformers.LlamaConfig(**SHAPE, **GATED, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
  ),
  "qwen2": (
    transformers.Qwen2ForCausalLM,
    transformers.Qwen2Config(**SHAPE, **GATED, tie_word_embeddings=True),
  ),
  "qwen3": (
    transformers.Qwen3ForCausalLM,
    transformers.Qwen3Config(**SHAPE, **GATED, head_dim=6, tie_word_embeddings=True),
  ),
  "mixtral": (
    transformers.MixtralForCausalLM,
    transformers.MixtralConfig(
      **SHAPE, **{**GATED, "intermediate_size": 12}, num_local_experts=4, sliding_window=None
    ),
  ),
}


def main() -> None:
  """Writes all of them."""
  for seed, (name, (kind, config)) in enumerate(MODELS.items()):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
      for path, weight in model.named_parameters():
        center = 1.0 if weight.ndim == 1 and path.endswith("weight") else 0.0
        weight.copy_(center + 0.3 * torch.randn_like(weight))
      tokens = torch.randint(0, 54, (2, 12))
      logits = model(tokens).logits
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    expected = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy()}
    save_file(expected, HERE / name / "expected.safetensors")


if __name__ == "__main__":
  main()
