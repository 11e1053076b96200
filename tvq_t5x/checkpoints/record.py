"""What a checkpoint says of the run that wrote it, checked as it is read: it may be damaged."""

from collections.abc import Callable
from typing import Any

from tvq_t5x.checkpoints import model_settings


def check(record: Any) -> None:
  """Refuses a record with a field that is missing or wrong.

  Args:
    record: from JSON.

  Raises:
    ValueError: naming the field.
  """
  if not isinstance(record, dict):
    raise ValueError('a record with fields is expected')
  for name in _REQUIRED:
    if name not in record:
      raise ValueError(f'the field {name!r} is missing')
  for name, is_right in {**_REQUIRED, **_OPTIONAL}.items():
    if name in record and not is_right(record[name]):
      raise ValueError(f'the field {name!r} is wrong')


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_dict(value: Any) -> bool:
  return isinstance(value, dict)


def _dict_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: _is_dict(value) and all(map(is_right, value.values()))


def _is_array(value: Any) -> bool:
  """Whether it is the shape and the dtype of an array."""
  if not isinstance(value, list) or len(value) != 2:
    return False
  shape, dtype = value
  return isinstance(shape, list) and all(map(_is_whole, shape)) and isinstance(dtype, str)


def _is_sum(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


_REQUIRED: dict[str, Callable[[Any], bool]] = {
  'model': model_settings.is_complete,
  'arrays': _dict_of(_is_array),
  'updates_in_batch': lambda value: _is_whole(value) and value > 0,
  'random_seed': _is_whole,
}
# Earlier versions have not written them all.
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
  'checksums': _dict_of(_is_whole),
  'data': _is_dict,
  'training': _is_dict,
  'window': _dict_of(_is_sum),
}
