"""Paths as Orbax takes them."""

import os

from etils import epath

from tvq_t5x.checkpoints import layout
from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import origins
from tvq_t5x.training.base_model import Model


def absolute(path: str) -> str:
  """The absolute path of a folder; one in a bucket, as 'gs://bucket/folder', stays as it is.

  Raises:
    ConfigError: if T5X would not find its checkpoints there, as it takes the name for a pattern.
  """
  full = path if '://' in path else os.path.abspath(path)
  files.check_name(full, f'{path!r}')
  return full


@origins.added_to_errors()
def trained(path: str, model: Model) -> str:
  """The absolute path of a checkpoint, whose parameters are to be used and not trained.

  Args:
    path: of its folder.
    model: that it is of.

  Raises:
    ConfigError: if the checkpoint says that it was trained with another vocabulary.
  """
  found = absolute(path)
  if other := layout.other_vocabulary(epath.Path(found), model.data_identity):
    raise ConfigError(
      f'{found} was trained with another vocabulary: {other}. Give the one that it was trained '
      'with.'
    )
  return found
