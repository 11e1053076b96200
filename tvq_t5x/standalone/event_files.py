"""TensorBoard's files of events, made to agree with where a run goes on."""

import os
import pathlib
from collections.abc import Iterator

import tensorflow as tf


def drop_after(folder: pathlib.Path, last_step: int) -> None:
  """Removes the events after a step, which the run writes again.

  What a kill has cut short at the end of a file goes as well, as readers stop there.

  Args:
    folder: of files of events, and of such folders; links are not followed.
    last_step: that is kept.
  """
  for path in _files(folder):
    kept, dropped = [], False
    for serialized in _records(path):
      if serialized is not None and tf.compat.v1.Event.FromString(serialized).step <= last_step:
        kept.append(serialized)
      else:
        dropped = True
    if dropped:
      _replace(path, kept)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  for parent, _, names in os.walk(folder):
    if pathlib.Path(parent).is_symlink():
      continue
    for name in names:
      path = pathlib.Path(parent, name)
      if name.startswith('events.out.tfevents.') and not path.is_symlink():
        yield path


def _records(path: pathlib.Path) -> Iterator[bytes | None]:
  """The events of a file; None at the end if they are not all of it."""
  try:
    for record in tf.data.TFRecordDataset(str(path)):
      yield bytes(record.numpy())
  except tf.errors.DataLossError:
    yield None


def _replace(path: pathlib.Path, records: list[bytes]) -> None:
  # No name that TensorBoard takes for one of its own.
  temporary = path.with_name(f'incomplete.{path.name.removeprefix("events.out.")}')
  try:
    with tf.io.TFRecordWriter(str(temporary)) as writer:
      for record in records:
        writer.write(record)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
