"""The inputs of a layer besides x: the microbatch, whether it trains, and its random numbers.

A layer must do the same wherever and whenever it runs: in any stage, on any mesh, in a forward or
in its recomputation. So nothing here depends on stages or ticks, and random numbers are drawn from
keys that are made of the layer's, the microbatch's and the row's number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp

from jaxpipe.stack.module.row_keys import no_key, row_key

_NO_KEY = "the stack uses dropout; call the step with a key: step(params, batch, key)"
_DRAWS_IN_EVALUATION = (
  "a layer draws random numbers in evaluation, which has no key; give its call a parameter train or"
  " deterministic, or read context.training"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filled:
  """A batch with rows at its end that only fill it up, such as the last batch of an epoch.

  Modules are given `batch`; the head that sums up a loss for every row leaves these rows out.

  Attributes:
    batch: the batch, leaves `[rows, ...]`.
    counts: bool [rows], False for the rows that only fill up.
  """

  batch: Any
  counts: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
  """An entry of a batch without rows, such as a table, that every microbatch is given whole.

  Without this word an array is `[B, ...]` and divided, whatever its first dim is; a scalar, which
  has nothing to divide, is passed whole by itself. Modules and the loss are given the value.

  Attributes:
    value: an array, or a tree of arrays.
  """

  value: Any


def is_whole(entry: Any) -> bool:
  """Whether an entry of a batch has no rows: a scalar, or what is wrapped in `Whole`."""
  return isinstance(entry, Whole) or (jax.tree_util.all_leaves([entry]) and jnp.shape(entry) == ())


def map_entries(
  rows: Callable[[Any], Any], whole: Callable[[Any], Any], batch: Any, *rest: Any
) -> Any:
  """Maps a batch's leaves that have rows by one function, and what is whole by another."""
  return jax.tree.map(
    lambda entry, *more: (whole if is_whole(entry) else rows)(entry, *more),
    batch,
    *rest,
    is_leaf=lambda entry: isinstance(entry, Whole),
  )


def leaves_of_rows(batch: Any) -> list[tuple[Any, Any]]:
  """Path and leaf of every leaf of a batch that has rows."""
  entries = jax.tree.leaves_with_path(batch, is_leaf=lambda entry: isinstance(entry, Whole))
  return [(path, leaf) for path, leaf in entries if not is_whole(leaf)]


def rows_alone(batch: Any) -> Any:
  """The batch as modules see it: not filled up, and with what is whole in place of its wrapper."""
  batch = batch.batch if isinstance(batch, Filled) else batch
  return map_entries(lambda leaf: leaf, _value, batch)


def _value(entry: Any) -> Any:
  """What an entry without rows holds."""
  return entry.value if isinstance(entry, Whole) else entry


class MicrobatchInputs(TypedDict):
  """Inputs that every module of a stack has from its microbatch, besides its parameters and x.

  Keys:
    batch: the microbatch's own inputs, leaves `[rows, ...]`.
    key: PRNG key of the step, or None where the step was given none.
    microbatch: int32 [], the microbatch's number within the step.
    rows: int32 [rows], each row's number within the whole microbatch over all data shards.
  """

  batch: Any
  key: jax.Array | None
  microbatch: int | jax.Array
  rows: jax.Array


class LayerInputs(MicrobatchInputs):
  """Inputs of one call of one layer, besides its parameters and x.

  Keys:
    All of `MicrobatchInputs`, and
    layer: int32 [], the layer's number in the model, whatever stage it lies in.
    state: the layer's frozen variables, leaves without a layer dim; missing where it has none.
  """

  layer: int | jax.Array
  state: NotRequired[Any]


def microbatch_inputs(inputs: Mapping[str, Any]) -> MicrobatchInputs:
  """Drops `layer`, and whatever else modules do not share, from a layer's or stage's inputs."""
  return MicrobatchInputs(
    batch=inputs["batch"],
    key=inputs["key"],
    microbatch=inputs["microbatch"],
    rows=inputs["rows"],
  )


@dataclasses.dataclass
class Context:
  """The second argument of a layer, beside x; made anew for every call of every layer.

  Attributes:
    batch: the microbatch's own inputs, leaves `[rows, ...]`.
    training: False in evaluation, where dropout is the identity.
    call_key: PRNG key of this (step, layer, microbatch), or None where the step was given none.
    rows: int32 [rows], each row's number within the whole microbatch over all data shards.
    once: shapes beginning with as many as there are rows that `key` draws once, not by rows.
    _draws: how many masks `dropout` has drawn in this call, so that each has a key of its own.
  """

  batch: Any
  training: bool
  call_key: jax.Array | None
  rows: jax.Array
  once: frozenset[tuple[int, ...]] = frozenset()
  _draws: int = 0

  @property
  def key(self) -> jax.Array | None:
    """A PRNG key of this call that draws by rows: what has a leading dim of rows is keyed by them.

    So `nnx.Dropout(...)(x, rngs=nnx.Rngs(context.key))` drops alike on every mesh. None in
    evaluation, and where the step was given no key.
    """
    return None if self.call_key is None else row_key(self.call_key, self.rows, self.once)

  def stream(self, number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The key or the count of a random stream that a module keeps, for this call.

    Args:
      number: which of the module's streams, so that each has a key of its own.
      leaf: shape and dtype of the key, or of the count.

    Returns:
      A typed key of that shape that draws by rows, or a count of zeros. A draw without a key of the
      step is refused when the program is compiled.
    """
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.zeros(leaf.shape, leaf.dtype)
    key = self._drawing_key(number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key

  def linen_keys(self) -> dict[str, jax.Array]:
    """Keys of this call for a Linen module, by the names of its streams.

    Of a name that is not there Linen takes `params`. It folds the path of each submodule into them.
    """
    return {"params": self._drawing_key(0), "dropout": self._drawing_key(1)}

  def _drawing_key(self, number: int) -> jax.Array:
    """The key of one stream of this call, or one that refuses to draw."""
    if self.call_key is None:
      why = _NO_KEY if self.training else _DRAWS_IN_EVALUATION
      return no_key(self.rows.shape[0], why)
    return row_key(jax.random.fold_in(self.call_key, number), self.rows, self.once)

  @classmethod
  def create(
    cls,
    training: bool,
    *,
    batch: Any,
    key: jax.Array | None,
    layer: int | jax.Array,
    microbatch: int | jax.Array,
    rows: jax.Array,
    state: Any = None,
  ) -> Context:
    """Makes the context of one call of a layer.

    Args:
      training: False in evaluation.
      batch, key, layer, microbatch, rows: see `LayerInputs`.
      state: the layer's frozen variables, which are its module's and no part of a context.
    """
    # Never from stage or tick: a recomputation on a later tick must draw the same masks.
    if key is not None:
      key = jax.random.fold_in(jax.random.fold_in(key, layer), microbatch)
    return cls(rows_alone(batch), training, key, rows)

  def dropout(
    self,
    x: jax.Array,
    rate: float,
    iteration: int | jax.Array = 0,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Zeroes elements of x with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Masks are drawn row by row, keyed by (step, layer, microbatch, row) and by the number of the
    call within the layer, so that they are the same under every schedule, mesh and recompute.

    Args:
      x: float array `[rows, ...]`.
      rate: probability in [0, 1).
      iteration: inside a `lax.scan` or loop, its number; calls are counted while a layer is traced,
        and a loop's body is traced once, so that all iterations would drop alike.
      positions: int32 [n], where x is `[rows, n, ...]` and its second dim may be cut over the mesh:
        the number of each position in the whole row, which is then part of the key.

    Returns:
      An array like x; x itself in evaluation, or where the rate is 0.

    Raises:
      ValueError: rate outside [0, 1), no key given to the step, or x without the row dim.
    """
    if not 0 <= rate < 1:
      raise ValueError(f"dropout rate {rate} is not in [0, 1)")
    if not self.training or rate == 0:
      return x
    if self.call_key is None:
      raise ValueError(_NO_KEY)
    if x.shape[:1] != self.rows.shape:
      raise ValueError(f"dropout wants x [{self.rows.shape[0]} rows, ...]; got shape {x.shape}")
    draw = jax.random.fold_in(jax.random.fold_in(self.call_key, self._draws), iteration)
    # A plain number, not an array: it is counted while the layer is traced.
    self._draws += 1

    def keep_in_row(row: jax.Array) -> jax.Array:
      key = jax.random.fold_in(draw, row)
      if positions is None:
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

      def keep_at(position: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, position), 1 - rate, x.shape[2:])

      return jax.vmap(keep_at)(positions)

    keep = jax.vmap(keep_in_row)(self.rows)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def check_key(key: Any) -> None:
  """Refuses a PRNG key by which masks or fresh values would depend on the mesh.

  Masks are drawn row by row, by a `jax.vmap` over keys. Only of the `threefry2x32` generator are
  the bits of a key then its own: `rbg` and `unsafe_rbg` draw those of all rows at once.

  Args:
    key: one key, as `jax.random.key(seed)` or `jax.random.PRNGKey(seed)` returns it; None passes.

  Raises:
    ValueError: another generator, several keys, or no key.
  """
  if key is None:
    return
  remedy = "; pass jax.random.key(seed, impl='threefry2x32')"
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
  if not typed and (dtype != jnp.uint32 or shape not in ((2,), (4,))):
    found = type(key).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
    raise ValueError(f"the key is {found}, which is no PRNG key{remedy}")
  if typed and shape:
    raise ValueError(f"the key is an array of keys {list(shape)}, and one is wanted{remedy}")
  # A raw key does not say its generator: by its length it is one of the default's, or of `rbg`.
  config: Any = jax.config
  raw = config.jax_default_prng_impl if shape == (2,) else "rbg"
  name = str(jax.random.key_impl(key)) if typed else raw
  if name != "threefry2x32":
    raise ValueError(
      f"the key is of the generator {name}, by which masks would depend on the mesh{remedy}"
    )


def check_leaves(batch: Any) -> None:
  """Refuses leaves of a batch that cannot be divided and sent, such as texts and PRNG keys.

  Raises:
    ValueError: a leaf that is no array of numbers; names it.
  """
  for path, leaf in jax.tree.leaves_with_path(batch):
    name, dtype = f"batch{jax.tree_util.keystr(path)}", getattr(leaf, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
      raise ValueError(
        f"{name} holds PRNG keys, which no batch has: pass a key as the step's third argument, or"
        " raw bits, jax.random.key_data(keys), and wrap them again where they are used"
      )
    if isinstance(leaf, bool | int | float | complex):
      continue
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
      kind = f"a {type(leaf).__name__}" if dtype is None else f"an array of {dtype}"
      raise ValueError(f"{name} is {kind} and no array of numbers; leave it out of the batch")
