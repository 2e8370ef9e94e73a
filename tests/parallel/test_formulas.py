"""Formulas against the figures that their papers print."""

import pytest

from jaxpipe.parallel import formulas

# The models of Korthikanti et al., 2022, table 3, and what section 4.1 says of them.
GPT3 = dict(b=1, s=2048, h=12288, a=96)
MT_NLG = dict(b=1, s=2048, h=20480, a=128)


@pytest.mark.parametrize("model, scores", [(GPT3, 80), (MT_NLG, 64)])
def test_scores_against_all_else(model, scores):
  """5as/h is 80 for GPT-3 and 64 for MT-NLG, beside the 34 of all else."""
  sbh = model["s"] * model["b"] * model["h"]
  assert formulas.kept(**model) == (34 + scores) * sbh
  assert formulas.kept(**model, t=8, sequence=True) == (34 + scores) * sbh / 8
  assert formulas.kept(**model, t=8) == (10 + 3 + scores / 8) * sbh
  assert formulas.kept(**model, t=8, sequence=True, scores=False) == 34 / 8 * sbh
  assert formulas.kept(**model, t=8, scores=False) == 13 * sbh


@pytest.mark.parametrize("model, saved", [(GPT3, 0.70), (MT_NLG, 0.65)])
def test_what_selective_recomputation_saves(model, saved):
  whole = formulas.kept(**model, t=8, sequence=True)
  assert 1 - formulas.kept(**model, t=8, sequence=True, scores=False) / whole == pytest.approx(
    saved, abs=0.005
  )


def test_tensor_parallelism_sends_8bsh():
  """8bsh (t - 1) / t elements of a layer and microbatch: Narayanan et al., 2021, section 3.2."""
  assert formulas.tensor(2, 2048, 1024, 8, itemsize=1) == 8 * 2 * 2048 * 1024 * 7 / 8
  assert formulas.tensor(2, 2048, 1024, 1) == 0


def test_sequence_parallelism_sends_as_much():
  shape = dict(b=2, s=2048, h=1024, t=8)
  assert formulas.tensor_sequence(**shape) == formulas.tensor(**shape)
  # Ten collectives in place of eight.
  assert formulas.tensor_sequence(**shape, repeated=2) == formulas.tensor(**shape) * 10 / 8


def test_pipeline_hop():
  """The same section: bsh elements."""
  assert formulas.hop(1, 2048, 12288) == 2 * 2048 * 12288


def test_ring_attention_and_ulysses():
  assert formulas.ring_attention(1, 4096, 512, 4, itemsize=1) == 2 * 3 * 1024 * 512
  # 4Nh/P, of which a P-th stays: section 3.2 of the Ulysses paper leaves that out.
  assert formulas.ulysses(1, 4096, 512, 4, itemsize=1) == 4 * 4096 * 512 / 4 * 3 / 4
  assert formulas.ulysses(1, 4096, 512, 4, itemsize=1, kv=128) == (2 + 2 / 4) * 4096 * 128 * 3 / 4
  # Ulysses grows with 1 / c, and a ring does not shrink.
  assert formulas.ulysses(1, 4096, 512, 8) < formulas.ulysses(1, 4096, 512, 4)
  assert formulas.ring_attention(1, 4096, 512, 8) > formulas.ring_attention(1, 4096, 512, 4)


def test_fsdp_sends_half_as_much_again_as_data_parallelism():
  """ZeRO, section 7.2.2: 3 Psi in place of 2 Psi."""
  whole = formulas.data(1000, 8, itemsize=2)
  cut = formulas.fsdp(1000, 8, gathers=2, scatters=1, itemsize=2, sums=2)
  assert cut / whole == 1.5
  assert formulas.fsdp(1000, 8, gathers=0, scatters=1) == 7 / 8 * 4000


def test_experts():
  assert formulas.experts(128, 64, 4, itemsize=1) == 4 * 128 * 64 * 3 / 4
  assert formulas.experts(128, 64, 1) == 0
