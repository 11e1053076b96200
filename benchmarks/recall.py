"""Multi-query associative recall (arXiv 2312.04927): quadratic attention, Transformer-VQ, LongVQ.

  python benchmarks/recall.py --lengths=128,512 --pairs=4,16 --steps=500 --out=runs/recall

trains each model on `recall_LENGTH_PAIRS`, a run for each cell, and writes into docs/quality.md how
many of the values are recalled on the test split. The same command goes on where it was
interrupted; `--table_only` runs nothing.
"""

import pathlib
from collections.abc import Iterator, Sequence

import runs
from absl import app, flags
from runs import Model, Run

from tvq_t5x.common import machines

_LENGTHS = flags.DEFINE_list('lengths', ['128', '512'], 'Of sequences.')
_PAIRS = flags.DEFINE_list('pairs', ['4', '16'], 'Of a key and a value, in a sequence.')
_STEPS = flags.DEFINE_integer('steps', 500, 'Updates.', lower_bound=1)
_VOCAB = flags.DEFINE_integer('vocab_size', 64, 'Keys and values together, and three more.')
_OUT = flags.DEFINE_string('out', 'runs/recall', 'Folder of the runs.')
_DOCS = flags.DEFINE_string('docs', str(runs.ROOT / 'docs'), 'Folder of quality.md.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Writes what there is.')

MODELS = (
  runs.QUADRATIC,
  runs.TRANSFORMER_VQ,
  Model('LongVQ', runs.LONGVQ, {'config.TransformerConfig.mlp_dim': 336}),
)
_FILES = ('gin/kjv_tiny.gin', 'gin/tasks/recall.gin')
_TOKENS_OF_A_STEP = 4096


def _run(model: Model, length: int, pairs: int) -> Run:
  steps = _STEPS.value
  folder = pathlib.Path(_OUT.value).absolute() / f'{model.name.lower()}_{length}_{pairs}_{steps}'
  settings = {
    'MIXTURE_OR_TASK_NAME': f'recall_{length}_{pairs}',
    'TASK_FEATURE_LENGTHS': {'targets': length},
    'UPDATE_LEN': None,
    'BATCH_SIZE': _TOKENS_OF_A_STEP // length,
    'PEAK_LEARNING_RATE': 1e-3,
    'WARMUP_STEPS': min(100, steps // 8),
    'EVAL_PERIOD': max(1, steps // 4),
    'SAMPLE_PERIOD': steps,
    'CHECKPOINT_PERIOD': max(1, steps // 8),
    'samples.SampleConfig.length': 1,
    'recall.data.vocab_size': _VOCAB.value,
    'recall.data.num_eval': 1000,
  }
  return Run(model, folder, steps, _FILES, settings)


def _cells() -> Iterator[tuple[int, int]]:
  """Lengths and numbers of pairs, less those that don't fit."""
  for length in map(int, _LENGTHS.value):
    for pairs in map(int, _PAIRS.value):
      if 4 * pairs <= length:
        yield length, pairs


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  found = {cell: [_run(model, *cell) for model in MODELS] for cell in _cells()}
  if not _TABLE_ONLY.value:
    runs.finish_all((run for of_cell in found.values() for run in of_cell), 'accuracy')
  lines = [
    f'| length | pairs | {" | ".join(model.name for model in MODELS)} |',
    f'| ---: | ---: | {" | ".join("---:" for _ in MODELS)} |',
  ]
  for (length, pairs), of_cell in found.items():
    cells = ' | '.join(runs.cell([run], 'accuracy') for run in of_cell)
    lines.append(f'| {length:,} | {pairs} | {cells} |')
  table = '\n'.join(lines)
  print(table)
  text = f"""{table}

Share of the values that are recalled on the test split, after {_STEPS.value:,} updates of
{_TOKENS_OF_A_STEP:,} tokens, one run each, {_VOCAB.value} ids; {machines.name()}. Made by

    python benchmarks/recall.py --lengths={','.join(_LENGTHS.value)} \\
        --pairs={','.join(_PAIRS.value)} --steps={_STEPS.value} --vocab_size={_VOCAB.value}"""
  runs.write_part(pathlib.Path(_DOCS.value) / 'quality.md', 'recall', text)


if __name__ == '__main__':
  app.run(main)
