"""The README.md of an exported folder: what the model is, what it scored, how to use it."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tvq_t5x.common.errors import ConfigError, reason
from tvq_t5x.standalone import run_records

# Of a record or of what `evaluate` writes, in this order.
_SHOWN = (
  'bits_per_byte',
  'bits_per_dimension',
  'cross_entropy',
  'perplexity',
  'word_perplexity',
  'accuracy',
)

_PYTORCH = """\
## PyTorch

Needs `torch`, `transformers` and `safetensors`, and no JAX. The code is in this folder: read it,
and then trust it.

```python
import torch
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained('{name}', trust_remote_code=True).eval()
{tokenizer}
# What the model says of a text: nats of each token, given all before it.
with torch.no_grad():
  logits = model(tokens).logits[:, :-1]
nats = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

# A continuation, with a state of constant size in place of a cache that grows.
written = model.generate(tokens, max_new_tokens=100, do_sample=True, top_p={top_p})
{show}
```
"""
_TEXT = """\
tokenizer = AutoTokenizer.from_pretrained('{name}', trust_remote_code=True)
tokens = tokenizer('In the beginning', return_tensors='pt').input_ids
"""
_NO_TEXT = """\
# Ids of a document, after the 1 that begins it.
tokens = torch.tensor([[1, 5, 6, 7]])
"""


class Numbers(NamedTuple):
  """An evaluation: of what, and by name its metrics."""

  title: str
  values: Mapping[str, float]


def of_run(model_dir: pathlib.Path, step: int) -> list[Numbers]:
  """The evaluations of a run at a step, from its `metrics.jsonl`; none if there is no such file."""
  found: dict[str, Numbers] = {}
  for record in run_records.read_records(model_dir / 'metrics.jsonl'):
    split = record.get('split')
    if record.get('step') == step and split in (run_records.VALIDATION, run_records.TEST):
      found[split] = Numbers(f'{split}, step {step}', _values(record))
  return list(found.values())


def of_file(path: str) -> list[Numbers]:
  """What `evaluate --json=FILE` has written.

  Raises:
    ConfigError: if it is something else.
  """
  try:
    record = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    title = f'{record["task"]}, {record["split"]}, step {record["step"]}'
    return [Numbers(title, _values(record))]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError(
      f'--evaluation={path}: give a file that python -m tvq_t5x.evaluate --json=FILE has written '
      f'({reason(e)})'
    ) from None


def _values(record: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: record[name]
    for name in _SHOWN
    if isinstance(record.get(name), int | float) and math.isfinite(record[name])
  }


def text(
  name: str,
  facts: Mapping[str, Any],
  numbers: Sequence[Numbers],
  has_pytorch: bool,
  has_tokenizer: bool,
  top_p: float,
) -> str:
  """The page.

  Args:
    name: of the folder.
    facts: what is said of the model, by what it is.
    numbers: its evaluations.
    has_pytorch: whether the folder has code for PyTorch.
    has_tokenizer: whether it has a tokenizer for it.
    top_p: that samples of the run were drawn with.
  """
  tags = ['transformer-vq', 'tvq_t5x']
  head = ['---', *(['library_name: transformers'] if has_pytorch else []), 'tags:']
  lines = [*head, *(f'- {tag}' for tag in tags), '---', '', f'# {_quoted(name)}', '']
  lines += ['| | |', '| --- | --- |']
  lines += [f'| {what} | {_quoted(value)} |' for what, value in facts.items()]
  lines += ['', '## Evaluation', '']
  if not numbers:
    lines += ['None was given.', '']
  for evaluation in numbers:
    lines += [f'| {_quoted(evaluation.title)} | |', '| --- | ---: |']
    lines += [f'| {what} | {_shown(value)} |' for what, value in evaluation.values.items()]
    lines.append('')
  if has_pytorch:
    lines.append(_pytorch(name, has_tokenizer, top_p))
  lines += [
    '## JAX',
    '',
    'Back to a checkpoint, which `sample`, `evaluate`, fine-tuning and T5X take:',
    '',
    f'    python -m tvq_t5x.convert --folder={name} --output=runs/{name}',
    f'    python -m tvq_t5x.evaluate --checkpoint=runs/{name}',
    '',
  ]
  return '\n'.join(lines)


def _pytorch(name: str, has_tokenizer: bool, top_p: float) -> str:
  return _PYTORCH.format(
    name=name,
    tokenizer_import=', AutoTokenizer' if has_tokenizer else '',
    tokenizer=(_TEXT if has_tokenizer else _NO_TEXT).format(name=name),
    top_p=top_p,
    show='print(tokenizer.decode(written[0]))' if has_tokenizer else 'print(written[0])',
  )


def _shown(value: float) -> str:
  return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'


def _quoted(value: Any) -> str:
  """Text on one line that Markdown takes for nothing else."""
  line = ' '.join(str(value).split())
  return ''.join(f'\\{c}' if c in '\\`*_{}[]<>()#|!' else c for c in line)
