"""Own texts in T5X: the tokens of both engines are the same, and so what they train."""

import json

import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: its runs on own texts')

import t5x_runs
import tiny_task

from tvq_t5x.checkpoints import layout

STEPS = 8
MACROS = {'TRAIN_STEPS': STEPS, 'EVAL_PERIOD': STEPS, 'CHECKPOINT_PERIOD': STEPS}


@pytest.fixture
def text_files(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for split in ('train', 'validation', 'test'):
    (folder / f'{split}.txt').write_bytes(tiny_task.text(split))
  return str(folder)


def test_both_engines_train_the_same(text_files, tmp_path):
  settings = {
    **MACROS,
    'MIXTURE_OR_TASK_NAME': 'text',
    'TASK_FEATURE_LENGTHS': {'targets': 64},
    'TEXT_FILES': text_files,
  }
  files = (t5x_runs.TINY, 'gin/tasks/text.gin')
  standalone, t5x = tmp_path / 'standalone', tmp_path / 't5x'
  t5x_runs.train_standalone(standalone, files=files, **{**settings, 'SAMPLE_PERIOD': STEPS})
  t5x_runs.train(t5x, files=files, **settings)
  t5x_runs.assert_same_arrays(t5x, standalone, STEPS)
  data = [layout.data_identity(layout.folder(path, STEPS))['data'] for path in (standalone, t5x)]
  assert data[0] == data[1] and 'in 3 files' in json.dumps(data[0])
