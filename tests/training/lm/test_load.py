"""A finished run speaks: from its folder alone, without text, cache or mesh."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm import sample
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import LoadedRun
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.lm.sample import forward
from jaxpipe.training.loop.loop import train

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module", params=["byte", "bpe:264"])
def run(
  request: pytest.FixtureRequest,
  tmp_path_factory: pytest.TempPathFactory,
  make_config: MakeConfig,
) -> LoadedRun:
  folder = tmp_path_factory.mktemp("load")
  tokenizer = request.param
  train(
    build_run(make_config(folder, steps=30, mesh="stage:2", tokenizer=tokenizer, tied=True)).begin()
  )
  (folder / "text.txt").unlink()
  shutil.rmtree(folder / "cache")
  return jaxpipe.load(folder / "run")


def test_it_knows_what_it_was(run: LoadedRun) -> None:
  assert run.step == 30 and run.config.mesh == "stage:2"
  assert run.tokenizer.vocabulary_size == (256 if run.config.tokenizer == "byte" else 264)
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(run.params))


def test_samples_follow_prompt_seed_and_temperature(run: LoadedRun) -> None:
  text = run.sample("To be", 24, temperature=1.0, seed=1)
  assert text.startswith("To be") and len(text) > len("To be")
  assert run.sample("To be", 24, temperature=1.0, seed=1) == text
  assert run.sample("To be", 24, temperature=1.0, seed=2) != text
  greedy = run.sample("To be", 24, temperature=0.0, seed=1)
  assert run.sample("To be", 24, temperature=0.0, seed=2) == greedy
  assert run.sample("", 1) and run.sample("x" * 50, 1)


def test_greedy_samples_are_the_likeliest_tokens(run: LoadedRun) -> None:
  T = run.config.sequence_length
  prompt = "Whether 'tis nobler in the mind to suffer"
  ahead = jax.jit(functools.partial(forward, run.stack))
  for start in (prompt[:3], prompt):  # room in the window, and none
    tokens = run.tokenizer.encode(start).tolist()
    for _ in range(4):
      known = tokens[-T:]
      filled = np.array(known + [0] * (T - len(known)), np.int32)  # what follows is not seen
      logits_TV = ahead(run.params, filled)
      tokens.append(int(jnp.argmax(logits_TV[len(known) - 1])))
    assert run.sample(start, 4, temperature=0.0) == run.tokenizer.decode(tokens)


def test_the_window_slides(monkeypatch: pytest.MonkeyPatch) -> None:
  V, T = 13, 4

  def forward(stack: None, params: None, window_T: jax.Array) -> jax.Array:
    # Any change of what is in the window, or of where it ends, changes the next token.
    return jax.nn.one_hot(jnp.cumsum(window_T) % V, V)

  monkeypatch.setattr(sample, "forward", forward)
  start = (jnp.array([3, 5, 0, 0], jnp.int32), jnp.int32(2))
  keys = jax.random.split(jax.random.key(0), 10)
  stack: Any = None
  got = sample.generate(stack, None, start, keys, jnp.float32(0))
  want = [3, 5]
  for _ in range(10):
    want.append(sum(want[-T:]) % V)
  assert got.tolist() == want[2:]


def test_the_forward_is_the_one_that_was_trained(run: LoadedRun) -> None:
  tokens_T = jnp.arange(40, 40 + run.config.sequence_length, dtype=jnp.int32)
  targets_T = tokens_T + 1
  logits_TV = jax.jit(functools.partial(forward, run.stack))(run.params, tokens_T)
  loss = -jax.nn.log_softmax(logits_TV)[jnp.arange(len(tokens_T)), targets_T].mean()
  batch = {"tokens": tokens_T, "targets": targets_T, "weights": jnp.ones(len(tokens_T))}
  batch = {name: leaf[None] for name, leaf in batch.items()}
  (want, _), _ = jaxpipe.reference_value_and_grad(run.stack, microbatches=1)(run.params, batch)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_bytes_that_are_no_text_do_not_stop_it(run: LoadedRun) -> None:
  # A hot sample draws bytes almost evenly, so that UTF-8 breaks at once.
  assert "�" in run.sample("\n", 60, temperature=100.0)


def test_no_run_is_one_clear_line(tmp_path: Path, tiny: MakeConfig) -> None:
  with pytest.raises(ConfigError, match=r"--run_dir=.*nowhere: no run there; train one first"):
    jaxpipe.load(tmp_path / "nowhere")
  build_run(tiny()).begin()
  with pytest.raises(ConfigError, match=r"--run_dir=.*run: no checkpoint yet"):
    jaxpipe.load(tmp_path / "run")
