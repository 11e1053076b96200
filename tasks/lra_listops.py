"""`lra_listops`: values of nested lists, the first task of the Long Range Arena; 10 classes.

Read from the files as published, `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv` (96,000,
2,000 and 2,000 expressions), or as `python -m tvq_t5x.make_listops` writes them. The parentheses,
which tell no more than the brackets, are left out: there are 15 symbols, and less than 2,000 of
them in an expression.
"""

import numpy as np
import seqio

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, listops, locations, tables
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'LISTOPS_PATH'
_FILES = {'train': 'basic_train.tsv', 'validation': 'basic_val.tsv', 'test': 'basic_test.tsv'}
_COLUMNS = tables.Columns(('Source', 'Target'), header=True, label=1, num_classes=10)
# Padding is 0.
_SYMBOLS = (*listops.OPERATORS, ']', *map(str, range(listops.NUM_VALUES)))
_IDS = {symbol.encode(): i for i, symbol in enumerate(_SYMBOLS, 1)}


@configurable
def folder(path: str | None = None) -> str:
  """Where the files lie, in this folder or its `listops-1000`, as they are published.

  Args:
    path: of the folder; macro LISTOPS_PATH. None means the environment variable LISTOPS_PATH, or
      else the folder of --data_dir.

  Raises:
    ConfigError: if it is not set.
  """
  return locations.needed_data_path(_MACRO, path, _get_it)


def _get_it() -> str:
  return (
    'generate the files with python -m tvq_t5x.make_listops --output_dir=FOLDER, or unpack '
    'lra_release.gz, and give their folder with ' + locations.how_to_set_data(_MACRO)
  )


class _Expressions:
  """The rows of a file; see `classification.Examples`."""

  def __init__(self, path: str):
    self.path, self._table = path, tables.read(path, _COLUMNS)

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, index: int) -> classification.Example:
    source, _ = self._table.row(index)
    symbols = source.translate(None, b'()').split()
    try:
      ids = np.array([_IDS[symbol] for symbol in symbols], np.int32)
    except KeyError as e:
      raise ConfigError(
        f'{self.path!r}, line {index + 2}: {e.args[0].decode(errors="replace")!r} is no symbol of '
        f'ListOps; there are {" ".join(_SYMBOLS)}.'
      ) from e
    return classification.Example(ids, self._table.label(index))


def examples(split: str) -> _Expressions:
  """The expressions of a split."""
  name = _FILES[split]
  return _Expressions(tables.find(folder(), [name, f'listops-1000/{name}'], _get_it))


classification.register(
  'lra_listops',
  __name__,
  examples,
  splits=tuple(_FILES),
  num_classes=10,
  vocabulary=seqio.PassThroughVocabulary(len(_SYMBOLS) + 1),
)
