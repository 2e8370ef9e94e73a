"""The digits that ship: the file that the README describes, split once, drawn by (seed, step)."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.digits import load_digits, moved
from jaxpipe.data.experiments.examples import held_out, shuffled

FOLDER = Path(__file__).parents[3] / "data" / "digits"


@pytest.fixture(scope="module")
def digits():
  return load_digits(FOLDER / "digits.csv.gz")


def test_is_the_file_that_its_readme_describes() -> None:
  data = (FOLDER / "digits.csv.gz").read_bytes()
  readme = (FOLDER / "README.md").read_text()
  assert hashlib.sha256(data).hexdigest() in readme and f"{len(data):,} bytes" in readme


def test_the_split_leaves_out_nothing_and_is_even(digits) -> None:
  train, test = digits.train, digits.test
  assert (len(train["label"]), len(test["label"])) == (1437, 360)
  rows = np.concatenate([train["image"], test["image"]]).reshape(1797, -1)
  assert len(np.unique(rows, axis=0)) == 1797  # no image in both
  counts = np.bincount(test["label"])
  assert counts.min() >= 34 and counts.max() <= 37
  assert train["image"].dtype == np.float32 and train["image"].max() == 1
  assert digits.most_frequent == pytest.approx(0.1, abs=0.01)


def test_batches_depend_on_seed_and_step_alone(digits) -> None:
  batch = digits.batch(8, 3, 5)
  again = load_digits(FOLDER / "digits.csv.gz").batch(8, 3, 5)
  for name, leaf in batch.items():
    np.testing.assert_array_equal(leaf, again[name])
  for other in (digits.batch(8, 3, 6), digits.batch(8, 4, 5)):
    assert (other["image"] != batch["image"]).any()
  assert {name: leaf.dtype.name for name, leaf in batch.items()} == {
    **{"image": "float32", "label": "int32", "weights": "float32"}
  }


def test_images_move_and_what_comes_in_is_empty() -> None:
  image = np.arange(1, 10).reshape(1, 3, 3, 1)
  for by, want in (
    ((0, 0), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ((1, 0), [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),
    ((-1, 1), [[0, 4, 5], [0, 7, 8], [0, 0, 0]]),
  ):
    assert moved(image, np.array([by]))[0, :, :, 0].tolist() == want


@pytest.mark.parametrize("batch_size", [3, 5, 16])
def test_every_epoch_holds_every_example_once(batch_size: int) -> None:
  stream = np.concatenate([shuffled(7, batch_size, 0, step) for step in range(14)])
  epochs = stream[: len(stream) // 7 * 7].reshape(-1, 7)
  assert (np.sort(epochs, axis=1) == np.arange(7)).all()
  assert len({tuple(epoch) for epoch in epochs}) > 1


def test_held_out_examples_weigh_once() -> None:
  examples = {"x": np.arange(7)}
  batches = list(held_out(examples, 3))
  assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
  assert [batch["weights"].tolist() for batch in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"not packed", None])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
  if content is not None:
    (tmp_path / "d.gz").write_bytes(content)
  with pytest.raises(DataError, match=r"d.gz: .*") as caught:
    load_digits(tmp_path / "d.gz")
  assert "\n" not in str(caught.value)
