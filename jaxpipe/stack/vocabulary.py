"""Where a stack keeps its tables over the vocabulary, so that a schedule can cut them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxpipe.stack.module_spec import StackError, Tree
from jaxpipe.stack.paths import get_path


@dataclasses.dataclass(frozen=True)
class Tables:
  """Paths of the tables [V, D], and what the modules promise.

  Where the vocabulary is cut over the stages (`vocabulary=1` of a schedule), the modules are not
  called whole but by the parts that do not touch the table. For V, D and any number of targets:

      embed(batch)   == embed.enter(table[embed.ids(batch)], batch), ids from -V up to V-1
      head(x, batch) == (loss_sum, weight_sum, {"correct": ...}), with
          h [..., D] = head.features(x, batch)       logits [..., V] = h table'
          targets int [...], weights [...] = head.targets(batch)
          loss_sum = sum(weights * (logsumexp(logits) - logits[targets]))
          correct = sum(weights * (argmax(logits) == targets))

  `jaxpipe.check` compares them with the whole modules.

  Attributes:
    embed: path of the embedding's table in its parameters, `/`-joined.
    head: path of the head's.
  """

  embed: str
  head: str

  def check(self, shapes: Tree, tied: Mapping[str, str]) -> None:
    """Raises StackError where one of them is no table, is tied to what is none, or they differ."""
    found = [get_path(shapes[part], getattr(self, part)) for part in ("embed", "head")]
    if any(getattr(table, "ndim", None) != 2 for table in found):
      raise StackError(
        f"vocabulary: embed {self.embed} is {found[0]}, head {self.head} is {found[1]}; both must"
        " be tables [V, D]"
      )
    if found[0].shape[0] != found[1].shape[0]:
      raise StackError(
        f"vocabulary: the embedding has {found[0].shape[0]} rows, the head {found[1].shape[0]};"
        " both must have one for every token"
      )

    for theirs, ours in tied.items():
      if (theirs == self.head) != (ours == self.embed):
        raise StackError(
          f"vocabulary: head {theirs} is tied to embed {ours}, and the tables are embed"
          f" {self.embed} and head {self.head}; a table can be tied to the other table only"
        )


def check_divides(V: int, P: int) -> None:
  """Raises StackError where P devices cannot hold equally many of V rows."""
  if V % P:
    raise StackError(
      f"a vocabulary of {V} tokens cannot be cut over {P} devices; use {V - V % P + P} (tokens that"
      f" never occur do no harm), or {V - V % P}"
    )
