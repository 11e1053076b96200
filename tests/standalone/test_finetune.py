"""Runs of the standalone runner that start from a checkpoint of another run."""

import pathlib
import shutil

import numpy as np
import pytest
from util import next_batch, one_device

from tvq_t5x import train
from tvq_t5x.checkpoints import layout, manager
from tvq_t5x.common import named_arrays
from tvq_t5x.standalone import run_records, start

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_CHECKSUMS = 'checksums'
pytestmark = pytest.mark.usefixtures('logged')


def _run(folder, *bindings, files=(), dry_run=False, **macros):
  settings = [f'{name} = {value!r}' for name, value in {'MODEL_DIR': str(folder), **macros}.items()]
  with one_device():
    return train.run([_TINY, *files], [*settings, *bindings], dry_run=dry_run)


def _finetune(initial, folder, *bindings, dry_run=False, **macros):
  macros = {'INITIAL_CHECKPOINT_PATH': str(initial), 'LEARNING_RATE': 1e-3, **macros}
  files = ['gin/runs/finetune.gin']
  return _run(folder, *bindings, files=files, dry_run=dry_run, **{'TRAIN_STEPS': 24, **macros})


@pytest.fixture(scope='module')
def source(tiny_run):
  """A run of 16 steps."""
  return tiny_run


@pytest.fixture(scope='module')
def tuned(source, tmp_path_factory):
  """Its continuation to step 24 in another folder, and the checksums of what it starts with."""
  folder, sums = tmp_path_factory.mktemp('tuned') / 'run', []
  initial_state = manager.initial_state

  def spy(*args):
    state = initial_state(*args)
    sums.append(named_arrays.checksums(state))
    return state

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(start, 'initial_state', spy)
    assert _finetune(source, folder) == 0
  return folder, sums[0]


def test_it_starts_from_all_of_the_checkpoint(source, tuned):
  folder, sums = tuned
  # A constant learning rate needs no count of steps.
  assert sums.items() <= layout.read_metadata(layout.folder(source, 16))[_CHECKSUMS].items()
  end = layout.read_metadata(layout.folder(folder, 24))[_CHECKSUMS]
  assert end.keys() == sums.keys()
  assert all(end[name] != sums[name] for name in sums if name.startswith('params/'))


def test_steps_go_on_and_the_data_begins(source, tuned):
  folder, _ = tuned
  records = run_records.read_records(folder / 'metrics.jsonl')
  trained = {r['step']: r for r in records if r['split'] == run_records.TRAIN}
  assert sorted(trained) == [20, 24]
  assert all(r['learning_rate'] == pytest.approx(1e-3) for r in trained.values())
  # It has read as many batches as the source had at step 8.
  assert next_batch(folder, 24) == next_batch(source, 8)


@pytest.mark.slow
def test_an_interrupted_one_goes_on_by_itself(source, tuned, tmp_path):
  folder = tmp_path / 'run'
  initial = shutil.copytree(source, tmp_path / 'source')
  assert _finetune(layout.folder(initial, 16), folder, TRAIN_STEPS=20) == 0
  shutil.rmtree(initial)
  assert _finetune(initial, folder) == 0
  whole = layout.read_metadata(layout.folder(tuned[0], 24))
  assert layout.read_metadata(layout.folder(folder, 24))[_CHECKSUMS] == whole[_CHECKSUMS]


@pytest.mark.slow
def test_state_that_sequences_carry_begins_anew(tmp_path):
  carry = {'CARRY_STATE': True, 'SHUFFLE_TRAIN_EXAMPLES': False}
  assert _run(tmp_path / 'source', TRAIN_STEPS=8, **carry) == 0
  # Of another batch size, so with states for other sequences.
  settings = {'TRAIN_STEPS': 12, 'BATCH_SIZE': 4}
  assert _finetune(tmp_path / 'source', tmp_path / 'run', **settings, **carry) == 0
  shapes = layout.read_metadata(layout.folder(tmp_path / 'run', 12))['arrays']
  carried = [shape for name, (shape, _) in shapes.items() if name == 'carried/position']
  assert carried == [[4]]


@pytest.mark.parametrize(
  ('macros', 'bindings', 'parts'),
  [
    ({'INITIAL_CHECKPOINT_PATH': 'nothing'}, [], ['(macro INITIAL_CHECKPOINT_PATH)', 'no such']),
    ({'TRAIN_STEPS': 16}, [], ['total_steps = 16 (macro TRAIN_STEPS)', 'the 16 steps of']),
    ({'UPDATE_LEN': 16, 'TRAIN_STEPS': 24, 'INITIAL_CHECKPOINT_PATH': 8}, [], []),
    ({}, ['TransformerConfig.num_codes = 24'], ['of another model or optimizer', 'c_sum']),
    ({}, ['TransformerConfig.window_len = 16'], ['window_len = 16, there 8']),
    ({'LEARNING_RATE': None}, ['LEARNING_RATE = @optimizers.warmup_cosine()'], []),
  ],
)
def test_refusals(source, tmp_path, capsys, macros, bindings, parts):
  if macros.get('INITIAL_CHECKPOINT_PATH') == 8:
    macros = {**macros, 'INITIAL_CHECKPOINT_PATH': str(layout.folder(source, 8))}
  code = _finetune(source, tmp_path / 'run', *bindings, dry_run=True, **macros)
  message = capsys.readouterr().err
  assert code == (2 if parts else 0)
  for part in parts:
    assert part in message
  assert not (tmp_path / 'run').exists()


def test_an_unreadable_one_is_one_error(source, tmp_path, capsys):
  initial = shutil.copytree(source, tmp_path / 'source')
  for path in layout.folder(initial, 16).glob(f'{layout.STATE}/ocdbt.process_0/d/*'):
    path.write_bytes(np.zeros(100, np.uint8).tobytes())
  assert _finetune(initial, tmp_path / 'run') == 1
  message = capsys.readouterr().err
  assert message.startswith('error: The checkpoint') and 'can not be read' in message
  assert 'Traceback' not in message
