"""What a run has measured: a record, a line of `metrics.jsonl`, for each step and split."""

import json
import math
import pathlib
from typing import Any

Record = dict[str, Any]

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
# The loss by which checkpoints are compared.
LOSS = 'cross_entropy'
RECORDS = 'metrics.jsonl'


def read_records(path: pathlib.Path) -> list[Record]:
  """The records of a `metrics.jsonl`; one that a kill has cut short is left out."""
  records = []
  if path.exists():
    for line in path.read_text(encoding='utf-8').splitlines():
      try:
        record = json.loads(line)
      except ValueError:
        continue
      # JSON has no NaN.
      records.append({k: math.nan if v is None else v for k, v in record.items()})
  return records


def shortly(record: Record) -> str:
  """The metrics that matter most, such as 'bits_per_byte 1.8856, cross_entropy 1.3070'."""
  names = ('bits_per_byte', LOSS, 'accuracy')
  return ', '.join(f'{name} {record[name]:.4f}' for name in names if name in record)
