"""`lra_retrieval`: whether one paper cites the other, from the bytes of both; 2 classes.

Part of the Long Range Arena. Read from the files as published, `new_aan_pairs.train.tsv`,
`new_aan_pairs.eval.tsv` and `new_aan_pairs.test.tsv` (147,086, 18,090 and 17,437 pairs of papers of
the ACL Anthology Network): class, two ids and two texts between tabs, without a header and without
quoting. Of each text, the first 4,000 bytes are read.
"""

import seqio

from tvq_t5x.data import classification, locations, tables
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'AAN_PATH'
_FILES = {
  split: f'new_aan_pairs.{name}.tsv'
  for split, name in (('train', 'train'), ('validation', 'eval'), ('test', 'test'))
}
_COLUMNS = tables.Columns(
  ('label', 'id1', 'id2', 'text1', 'text2'), header=False, label=0, num_classes=2
)


@configurable
def folder(path: str | None = None) -> str:
  """Where the files lie, in this folder or its `tsv_data`, as they are published.

  Args:
    path: of the folder; macro AAN_PATH. None means the environment variable AAN_PATH, or else the
      folder of --data_dir.

  Raises:
    ConfigError: if it is not set.
  """
  return locations.needed_data_path(_MACRO, path, _get_it)


def _get_it() -> str:
  return (
    'unpack lra_release.gz of the Long Range Arena, and give the folder of its new_aan_pairs files '
    'with ' + locations.how_to_set_data(_MACRO)
  )


class _Pairs:
  """The rows of a file; see `classification.Examples`."""

  def __init__(self, path: str):
    self.path, self._table = path, tables.read(path, _COLUMNS)

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, index: int) -> classification.Example:
    *_, text1, text2 = self._table.row(index)
    return classification.Example(text1, self._table.label(index), text2)


def examples(split: str) -> _Pairs:
  """The pairs of a split."""
  name = _FILES[split]
  return _Pairs(tables.find(folder(), [name, f'tsv_data/{name}'], _get_it))


classification.register(
  'lra_retrieval',
  __name__,
  examples,
  splits=tuple(_FILES),
  num_classes=2,
  vocabulary=seqio.ByteVocabulary(),
  pair=True,
)
