"""Counts the comment lines of `pipeline/`, `stack/` and `parallel/`, folder by folder.

    .venv/bin/python docs/make/comments.py                 # this checkout
    .venv/bin/python docs/make/comments.py --root=FOLDER   # another one

A comment line has nothing but a comment: one behind code does not count. A code line is any other
that is neither blank nor part of a docstring. Prints a table; sources are parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import io
import pathlib
import tokenize
from collections.abc import Collection, Iterator

FOLDERS = ("pipeline", "stack", "parallel")
# The modules of `models/` that became `stack/`, for a checkout without that folder.
STACK = (
  "context",
  "forward",
  "linen",
  "modules",
  "packed",
  "part",
  "paths",
  "pieces",
  "stack",
  "tables",
)
# What a line may have besides without being code; a `DEDENT` stands on the line after its block.
NOT_CODE = {
  tokenize.COMMENT,
  tokenize.DEDENT,
  tokenize.ENDMARKER,
  tokenize.INDENT,
  tokenize.NEWLINE,
  tokenize.NL,
}


def main() -> None:
  """Prints the table of a checkout."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--root", type=pathlib.Path, help="another checkout")
  root = parser.parse_args().root or pathlib.Path(__file__).parents[2]
  print("| folder | files | code lines | comment lines | in 100 lines of code |")
  print("|---|---|---|---|---|")
  total = [0, 0, 0]
  for folder in FOLDERS:
    files = sources(root / "jaxpipe", folder)
    code, comments = zip(*(count(path.read_text()) for path in files), strict=True)
    numbers = [len(files), sum(code), sum(comments)]
    total = [a + b for a, b in zip(total, numbers, strict=True)]
    print(row(f"`{folder}/`", numbers))
  print(row("all three", total))


def row(name: str, numbers: Collection[int]) -> str:
  """Returns a line of the table, given the numbers of files, code lines and comment lines."""
  _, code, comments = numbers
  cells = [name, *(f"{n:,}" for n in numbers), f"{100 * comments / code:.1f}"]
  return f"| {' | '.join(cells)} |"


def sources(package: pathlib.Path, folder: str) -> list[pathlib.Path]:
  """Returns the modules of one of `FOLDERS`, sub-folders included, in order."""
  if folder == "stack" and not (package / folder).exists():
    return [package / "models" / f"{name}.py" for name in STACK]
  return sorted((package / folder).rglob("*.py"))


def count(source: str) -> tuple[int, int]:
  """Returns the numbers of code lines and of comment lines."""
  code: set[int] = set()
  comments = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    # A comment of its own begins its line.
    if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
      comments.add(token.start[0])
    elif token.type not in NOT_CODE:
      code.update(range(token.start[0], token.end[0] + 1))
  return len(code.difference(docstring_lines(source))), len(comments)


def docstring_lines(source: str) -> Iterator[int]:
  """Yields the numbers of the lines that docstrings stand on."""
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, documented) and ast.get_docstring(node) is not None:
      yield from range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


if __name__ == "__main__":
  main()
