"""What a dry run prints of a run: tables of arrays and of data."""

from collections.abc import Mapping

from tvq_t5x.common import words
from tvq_t5x.data.documents import Counts
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.placement import StateInfo


def state_table(info: StateInfo) -> str:
  """A line for each array of the train state, and totals."""
  rows = [
    (row.name, str(list(row.shape)), row.dtype, str(list(row.logical_axes)), str(row.spec))
    for row in info.rows
  ]
  head = ('array', 'shape', 'dtype', 'logical axes', 'sharding')
  return '\n'.join(
    [
      *words.aligned([head, *rows]),
      '',
      f'parameters: {info.num_parameters:,}',
      f'train state: {words.size(info.num_bytes)}, '
      f'{words.size(info.num_bytes_per_device)} on each device',
    ]
  )


def data_table(splits: Mapping[str, Counts | None]) -> str:
  """A line for each split whose counts are known; '' if there is none."""
  rows = [
    (split, f'{x.documents:,}', f'{x.text_bytes:,}', f'{x.tokens:,}' if x.tokens else 'not counted')
    for split, x in splits.items()
    if x is not None
  ]
  head = ('split', 'documents', 'bytes', 'tokens')
  return '\n'.join(words.aligned([head, *rows])) if rows else ''


def mesh(partitioner: Partitioner) -> str:
  """A mesh in words, such as '8 cpu devices (data 4 x model 2)'."""
  devices = partitioner.mesh.devices
  plural = 's' if devices.size > 1 else ''
  kind = devices.flat[0].platform
  return f'{devices.size} {kind} device{plural} ({partitioner.axes_in_words()})'
