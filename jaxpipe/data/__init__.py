"""The data of training runs, from files to NumPy arrays, without JAX.

`text/` makes token batches of text files, for language models; the names below are its public ones.
`experiments/` reads the data sets of the other experiments. Read `text/` in this order:
`tokenizer.py` (text to ids), `bins.py` (ids on disk), `text.py` (files to bins, cached),
`batches.py` and `evaluation.py` (bins to arrays).
"""

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.batches import TokenBatches
from jaxpipe.data.text.bins import BinHeader, TokenBin, open_bin, write_bin
from jaxpipe.data.text.bpe import BpeTokenizer, load_bpe, train_bpe
from jaxpipe.data.text.evaluation import EvaluationBatches, target_bytes
from jaxpipe.data.text.text import TextData, prepare_text
from jaxpipe.data.text.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer
from jaxpipe.data.text.windows import Batch

__all__ = [
  "Batch",
  "BinHeader",
  "BpeTokenizer",
  "ByteTokenizer",
  "DataError",
  "EvaluationBatches",
  "TextData",
  "TokenBatches",
  "TokenBin",
  "Tokenizer",
  "load_bpe",
  "make_tokenizer",
  "open_bin",
  "prepare_text",
  "target_bytes",
  "train_bpe",
  "write_bin",
]
