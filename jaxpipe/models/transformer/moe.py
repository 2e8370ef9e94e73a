"""A mixture of experts in place of an MLP: every token visits few of many MLPs.

    tokens -> router -> top_k experts of each token -> dispatch -> experts -> back -> weighted sum
               |
               '-> losses that keep the experts evenly loaded, added to the model's loss by the head

Experts lie over any of the mesh axes along which devices hold different tokens, also those that
attention uses for something else (MoE Parallel Folding, arXiv 2504.14960): with the experts over
`sequence`, eight devices cut both the row and the experts in eight. Tokens go to their experts and
come back in one of two ways, with a capacity or without one; `dispatch` says what each sends. For n
tokens a device and ep devices to the experts:

    with a capacity      capacity_factor * top_k * n slots on a device, computed full or not
    without (dropless)   ep * n * min(top_k, E / ep) rows on a device, the most that can come

For the rows of the second way, which are sorted by expert, the TPU compiler has kernels, except in
the gradients of the weights, where all rows are masked for each local expert (seen with jax
0.10.2). On CPU that is done everywhere, and is slow.

References:
  Shazeer et al., Sparsely-gated mixture of experts, arXiv 1701.06538; GShard, Lepikhin et al.,
  arXiv 2006.16668; Mixtral, Jiang et al., arXiv 2401.04088.

Dims: B rows and T positions that a device holds, D width, F hidden width, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.models.transformer.dispatch import dropless, in_slots, ragged
from jaxpipe.models.transformer.routing import Routes, group_size, route, row_losses
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import AXES, FSDP, SEQUENCE, STAGE, TENSOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """How many experts there are, how tokens choose among them, and where they lie.

  Attributes:
    experts: E, number of experts over all devices.
    top_k: K, number of experts that a token visits.
    capacity_factor: slots of an expert over the number of tokens that an even split would bring it;
      0: dropless. First choices get slots before second ones, so that a later position can displace
      an earlier one: with a capacity, training is not strictly causal.
    group: number of contiguous positions of a row that share slots, of which each expert has
      ceil(capacity_factor * group * K / E) for them. It decides which tokens are dropped, so it
      must divide each contiguous run that a device holds, on every mesh that shall give the same
      result. 0: the whole row.
    balance: coefficient of the load-balance loss, see `routing.row_losses`.
    z: coefficient of the router's z-loss, see `routing.row_losses`.
    shared: hidden width of an expert that every token visits besides, with weight 1; 0: none.
    normalize: whether the weights of a token's experts are made to sum to 1, as Mixtral does.
    axes: mesh axes over which the experts lie, the first outermost; () keeps all on every device.

  Raises:
    ValueError: numbers out of range, or axes that cannot hold experts.
  """

  experts: int
  top_k: int
  capacity_factor: float
  group: int
  balance: float
  z: float
  shared: int = 0
  normalize: bool = True
  axes: tuple[str, ...] = ("expert",)

  def __post_init__(self) -> None:
    if not 1 <= self.top_k <= self.experts:
      raise ValueError(
        f"top_k {self.top_k} of {self.experts} experts is impossible; use 1 to {self.experts}"
      )
    for name in ("capacity_factor", "group", "balance", "z", "shared"):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f"{name} {value} is not a number from 0 up; 0 turns it off")
    # Along `fsdp` parameters lie in pieces that are gathered before anything reads them.
    allowed = [axis for axis in AXES if axis not in (STAGE, FSDP)]
    if unknown := [axis for axis in self.axes if axis not in allowed]:
      raise ValueError(f"experts cannot lie over {unknown}; the axes are {', '.join(allowed)}")
    if len(set(self.axes)) < len(self.axes):
      raise ValueError(f"experts over {self.axes}: an axis stands twice; name each once")

  @property
  def folded(self) -> bool:
    """Whether experts lie over `tensor`, which then cuts no expert in itself."""
    return TENSOR in self.axes

  def capacity(self, positions: int) -> int:
    """Returns C, the slots that a group of so many positions has at each expert."""
    factor = Fraction(str(self.capacity_factor))  # 1.1 is meant, not the double next to it
    return min(positions, math.ceil(factor * positions * self.top_k / self.experts))


def check_experts(config: MoeConfig, sizes: Mapping[str, int]) -> None:
  """Refuses a mesh whose devices cannot hold equally many experts.

  Args:
    config: of the experts.
    sizes: mesh axis -> number of devices; an axis left out has one.

  Raises:
    ValueError: with both numbers and the nearest that work.
  """
  along = {axis: sizes.get(axis, 1) for axis in config.axes}
  E, n = config.experts, math.prod(along.values())
  if E % n == 0:
    return
  experts = [m for m in (E - E % n, E - E % n + n) if m >= max(n, config.top_k)]
  divisors = [d for d in range(1, E + 1) if E % d == 0]
  devices = [max(d for d in divisors if d < n), *[d for d in divisors if d > n][:1]]
  raise ValueError(
    f"{E} experts cannot lie over {n} devices"
    f" ({', '.join(f'{axis}:{size}' for axis, size in along.items())}); use"
    f" {' or '.join(map(str, experts))} experts, or {' or '.join(map(str, devices))} devices"
  )


def check_folded(config: MoeConfig, tensor: int, positions_cut: bool) -> None:
  """Raises ValueError for experts over `tensor` while its devices hold the same positions."""
  if config.folded and tensor > 1 and not positions_cut:
    raise ValueError(
      f"experts over {config.axes}: the {tensor} devices along tensor hold the same positions; cut"
      " positions over tensor (sequence parallelism), or leave tensor out"
    )


def expert_dims(config: MoeConfig) -> dict[str, tuple[str | None, ...]]:
  """Returns rules for the parameters of `Experts`: parameter -> a name for each of its dims.

  `experts` lies over `config.axes`; `mlp` over `tensor`, unless `config.folded`; `embed` is D.
  """
  into, out = ("embed", "mlp"), ("mlp", "embed")
  dims: dict[str, tuple[str | None, ...]] = {
    "router": (None, None),
    "gate": ("experts", *into),
    "up": ("experts", *into),
    "down": ("experts", *out),
  }
  if config.shared:
    dims |= {"shared_gate": into, "shared_up": into, "shared_down": out}
  return dims


class Experts(nnx.Module):
  """SwiGLU experts, their router, and perhaps one expert that all tokens share.

  On a mesh its parameters are this device's shards, cut as `expert_dims` says. A residual policy
  can keep by name: `experts_in` and `experts_out` (tokens where their experts are, and results that
  came back), `mlp_gate` and `mlp_up`. `dots` keeps none of them and repeats the transfers as well.
  """

  def __init__(
    self,
    config: MoeConfig,
    width: int,
    hidden: int,
    *,
    dtype: Any,
    param_dtype: Any,
    positions_cut: bool,
    rngs: nnx.Rngs,
    out_scale: float,
  ):
    """Makes all experts, whole.

    Args:
      config: how many experts, and how tokens choose them.
      width: D, width of a token.
      hidden: F, hidden width of each expert.
      dtype: dtype of the experts' arithmetic; the router's is float32 at least.
      param_dtype: dtype of the parameters.
      positions_cut: whether the positions of activations are cut over `tensor` outside of matmuls
        (Megatron's sequence parallelism).
      rngs: gives keys of its stream `params`.
      out_scale: standard deviation of the last matrix of each expert; of the others it is 0.02.
    """
    self.config, self.dtype, self.positions_cut = config, dtype, positions_cut

    def param(*shape: int, scale: float = 0.02) -> nnx.Param:
      return nnx.Param(scale * jax.random.normal(rngs.params(), shape, param_dtype))

    E, D, F, shared = config.experts, width, hidden, config.shared
    self.router = param(D, E)
    self.gate, self.up = param(E, D, F), param(E, D, F)
    self.down = param(E, F, D, scale=out_scale)
    if shared:
      self.shared_gate, self.shared_up = param(D, shared), param(D, shared)
      self.shared_down = param(shared, D, scale=out_scale)

  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends tokens to their experts, applies these, and adds up the results by token.

    Args:
      x_BTD: the rows and positions that this device holds.

    Returns:
      y_BTD, which is to be added to the residual stream, and this device's share of each row's
      router losses [B], for a loss that is a sum over positions: over `sequence` shares add up,
      along `tensor` every device has the same.

    Raises:
      ValueError: groups that what a device holds does not divide into, or experts over `tensor`
        while its devices hold the same positions.
    """
    config = self.config
    if self.positions_cut and not config.folded:
      # Each device of `tensor` has a part of F of every expert, and needs all tokens for it.
      x_BTD = axes.gather(x_BTD, TENSOR, 1)
    group = self._group(x_BTD.shape[1])
    routes = route(x_BTD, self.router[...], config.top_k, config.normalize)
    own = (TENSOR,) if config.folded else ()  # its devices hold, and route, unlike positions
    aux_B = row_losses(routes, config.balance, config.z, (SEQUENCE, *own), own)
    y_BTD = self._visit(x_BTD.astype(self.dtype), routes, group)
    if config.folded:
      return y_BTD, aux_B
    # Every device of `tensor` has multiplied with its part of F.
    y_BTD = axes.scatter(y_BTD, TENSOR, 1) if self.positions_cut else axes.total(y_BTD, TENSOR)
    return y_BTD, aux_B

  def _visit(self, x_BTD: jax.Array, routes: Routes, group: int) -> jax.Array:
    """The sum of each token's experts, [B, T, D]; where F is cut, this device's part of it."""
    config = self.config
    experts = self._cast(self.gate, self.up, self.down)
    L, over = len(experts[0]), config.axes
    # With shards of another size, tokens would go to experts that are not there.
    if L * axes.size(over) != config.experts:
      raise ValueError(
        f"{L} experts on each of {axes.size(over)} devices along {over} are not the"
        f" {config.experts} of the configuration; cut the parameters as expert_dims says"
      )
    if config.capacity_factor:
      C = config.capacity(group)
      y_BTD = in_slots(x_BTD, routes, group, C, over, partial(_swiglu, jnp.matmul, experts))
    else:
      y_BTD = dropless(
        x_BTD, routes, L, over, lambda x, sizes: _swiglu(partial(ragged, sizes), experts, x)
      )
    if not config.shared:
      return y_BTD
    # Cut over `tensor` as the experts are, so that it is a part of the same sum.
    shared = self._cast(self.shared_gate, self.shared_up, self.shared_down)
    return y_BTD + _swiglu(jnp.matmul, shared, x_BTD)

  def _cast(self, *weights: nnx.Param) -> list[jax.Array]:
    """Weights in the dtype of the arithmetic."""
    return [w[...].astype(self.dtype) for w in weights]

  def _group(self, positions: int) -> int:
    """S, or 0 without a capacity; checks that groups are the same on every mesh."""
    config, tensor, sequence = self.config, axes.size(TENSOR), axes.size(SEQUENCE)
    check_folded(config, tensor, self.positions_cut)
    if not config.capacity_factor:
      return 0
    # Along `sequence` a device holds two runs of positions that are far apart.
    runs, pieces = min(sequence, 2), sequence * (tensor if config.folded else 1)
    return group_size(config.group, positions, pieces, runs)


def _swiglu(
  multiply: Callable[[jax.Array, jax.Array], jax.Array], weights: Sequence[jax.Array], x: jax.Array
) -> jax.Array:
  """A gated MLP, or several; `multiply(x, w)` multiplies rows with one matrix or with several."""
  gate, up, down = weights
  inner = checkpoint_name(multiply(x, up), "mlp_up")
  opened = nnx.silu(checkpoint_name(multiply(x, gate), "mlp_gate"))
  return multiply(opened * inner, down)
