"""Checkpoints are complete or absent; damaged ones are named, moved away and passed over."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from tvq_t5x.checkpoints import layout
from tvq_t5x.checkpoints.manager import Checkpoints
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.data.datasets import POSITION, TrainingIterator
from tvq_t5x.training.train_state import TrainState

# What every record has.
_RECORD = {
  'model': {'head_type': 'gated', 'attention_type': 'vq'},
  'arrays': {'params/kernel': [[64, 64], 'float32']},
  'updates_in_batch': 1,
  'random_seed': 0,
}


def _batches(identity='one'):
  dataset = tf.data.Dataset.range(100).map(lambda i: {'i': i})
  return TrainingIterator(dataset, {'split': identity})


def _state(step):
  # Large enough that compressed arrays do not end up inside the index.
  noise = np.random.default_rng(step).standard_normal([64, 64]).astype(np.float32)
  params = {'kernel': jnp.asarray(noise), 'scale': jnp.asarray(noise[0])}
  return TrainState(jnp.int32(step), params, (jnp.asarray(-noise),))


def _abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), _state(0))


def _open(folder, keep=None, best=None):
  return Checkpoints(folder, keep, lambda: best)


def _write(folder, steps, **kwargs):
  batches = _batches()
  with _open(folder, **kwargs) as opened:
    for step in steps:
      next(batches)
      opened.save(step, _state(step), batches, {**_RECORD, 'note': step})


def _restore(folder, batches=None):
  batches = batches or _batches()
  with _open(folder) as opened:
    return opened.restore(_abstract(), batches), next(batches)['i']


def _assert_equal(state, step):
  jax.tree.map(np.testing.assert_array_equal, state, _state(step))


def test_state_metadata_and_position_come_back(tmp_path):
  _write(tmp_path, [10, 20, 30])
  (state, metadata), position = _restore(tmp_path)
  _assert_equal(state, 30)
  assert isinstance(state, TrainState)
  assert metadata['note'] == 30
  assert position == 3


def test_nothing_to_restore(tmp_path):
  with _open(tmp_path) as opened:
    assert opened.steps() == []
    with pytest.raises(CheckpointError, match='there is none'):
      opened.restore(_abstract(), _batches())


def test_the_best_is_kept_besides_the_latest(tmp_path):
  _write(tmp_path, [10, 20, 30, 40, 50], keep=2, best=20)
  assert layout.steps_in(tmp_path) == [20, 40, 50]


def test_without_a_score_the_latest_are_kept(tmp_path):
  _write(tmp_path, [10, 20, 30], keep=1)
  assert layout.steps_in(tmp_path) == [30]


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
  overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
  state, batches = _state(7), _batches()
  with _open(tmp_path) as opened:
    opened.save(7, state, batches, _RECORD)
    for _ in range(3):
      state = overwrite(state)
  _assert_equal(_restore(tmp_path)[0].state, 7)


def _largest(folder):
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(path, share=0.5):
  os.truncate(path, int(path.stat().st_size * share))


def _flip_bits(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x55
  path.write_bytes(content)


def _remove_tree(path):
  for p in sorted(path.rglob('*'), reverse=True):
    p.rmdir() if p.is_dir() else p.unlink()
  path.rmdir()


_DAMAGE = {
  'half of the arrays': lambda d: _truncate(_largest(d / 'state')),
  'a few bytes of the arrays less': lambda d: _truncate(_largest(d / 'state'), 0.9999),
  'arrays with wrong bits': lambda d: _flip_bits(_largest(d / 'state')),
  'no index of the arrays': lambda d: _truncate(d / 'state' / 'manifest.ocdbt', 0),
  'no description of the arrays': lambda d: _truncate(d / 'state' / '_METADATA'),
  'no arrays': lambda d: _remove_tree(d / 'state'),
  'half of the metadata': lambda d: _truncate(d / 'metadata' / 'metadata'),
  'half of the position': lambda d: _truncate(
    d / 'dataset' / 'train_ds-000-of-001.data-00000-of-00001'
  ),
  'no index of the position': lambda d: _truncate(d / 'dataset' / f'{POSITION}.index', 0),
  'half of the settings of the position': lambda d: _truncate(d / 'dataset' / 'config.json'),
  'no position': lambda d: _remove_tree(d / 'dataset'),
  'half of what Orbax says': lambda d: _truncate(d / '_CHECKPOINT_METADATA'),
  'every file empty': lambda d: [_truncate(p, 0) for p in d.rglob('*') if p.is_file()],
}
# All values can still be read, as their checksums say.
_HARMLESS = {'a few bytes of the arrays less', 'half of what Orbax says'}


@pytest.mark.parametrize('damage', _DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage):
  _write(tmp_path, [10, 20])
  _DAMAGE[damage](tmp_path / 'checkpoint_20')
  batches = _batches()
  with _open(tmp_path) as opened:
    state, metadata = opened.restore(_abstract(), batches)
    if damage in _HARMLESS:
      _assert_equal(state, 20)
      return
    _assert_equal(state, 10)
    assert metadata['note'] == 10
    assert next(batches)['i'] == 1
    message = caplog.text
    assert 'step 20 is damaged' in message and 'from the checkpoint of step 10' in message
    assert str(tmp_path / 'damaged' / 'checkpoint_20') in message
    assert (tmp_path / 'damaged' / 'checkpoint_20').is_dir()
    opened.save(20, _state(20), batches, {**_RECORD, 'note': 'again'})
  (state, metadata), position = _restore(tmp_path)
  _assert_equal(state, 20)
  assert (metadata['note'], position) == ('again', 2)


def _write_record(folder, step, **changes):
  path = folder / f'checkpoint_{step}' / 'metadata' / 'metadata'
  record = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
  return path


@pytest.mark.parametrize('field', ['model', 'arrays', 'updates_in_batch', 'random_seed'])
def test_a_record_without_a_field_names_it_and_the_file(tmp_path, caplog, field):
  _write(tmp_path, [10, 20])
  path = _write_record(tmp_path, 20, **{field: None})
  with pytest.raises(ValueError, match=f'the field {field!r} is missing in {path}'):
    layout.read_metadata(path.parents[1])
  _assert_equal(_restore(tmp_path)[0].state, 10)
  assert f'step 20 is damaged (the field {field!r} is missing in {path}' in caplog.text


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('model', {}),
    ('model', 'small'),
    ('arrays', {'params/kernel': [64, 'float32']}),
    ('arrays', ['params/kernel']),
    ('updates_in_batch', 0),
    ('random_seed', '0'),
    ('checksums', {'params/kernel': 'x'}),
    ('data', []),
    ('training', 'adamw'),
    ('window', {'loss': [1.0]}),
  ],
)
def test_a_wrong_field_of_a_record_is_named(tmp_path, field, value):
  _write(tmp_path, [10])
  path = _write_record(tmp_path, 10, **{field: value})
  with pytest.raises(ValueError, match=f'the field {field!r} is wrong in {path}'):
    layout.read_metadata(path.parents[1])
  with pytest.raises(CheckpointError, match=f'step 10: the field {field!r} is wrong'):
    _restore(tmp_path)


@pytest.mark.parametrize('text', ['', '[]', '7', '{"model": ', '\0'])
def test_what_is_no_record_names_the_file(tmp_path, text):
  _write(tmp_path, [10])
  path = tmp_path / 'checkpoint_10' / 'metadata' / 'metadata'
  path.write_text(text)
  with pytest.raises(ValueError, match=f' in {path}'):
    layout.read_metadata(path.parents[1])


def _strangers(folder):
  for name in ('checkpoint_050', 'checkpoint_60', 'checkpoint_x', 'checkpoint_1'):
    (folder / name).mkdir()
  (folder / 'checkpoint_x' / 'file').write_text('')
  (folder / 'checkpoint_99').write_text('')
  (folder / 'checkpoint_98').symlink_to('nothing')
  (folder / 'latest').symlink_to('checkpoint_20')


def test_what_is_no_checkpoint_is_named_and_left_alone(tmp_path, caplog):
  _write(tmp_path, [10, 20])
  _strangers(tmp_path)
  assert layout.steps_in(tmp_path) == [10, 20]
  assert layout.find(str(tmp_path), 'x') == tmp_path / 'checkpoint_20'
  _assert_equal(_restore(tmp_path)[0].state, 20)
  names = ('checkpoint_050', 'checkpoint_1', 'checkpoint_60', 'checkpoint_98', 'checkpoint_99')
  assert f'passed over: {", ".join(names)}.' in caplog.text
  assert not (tmp_path / 'damaged').exists()


def test_a_save_moves_away_what_has_its_name(tmp_path, caplog):
  _write(tmp_path, [10, 20])
  _strangers(tmp_path)
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'file').write_text('')
  (tmp_path / 'checkpoint_70').symlink_to(outside)
  (tmp_path / 'checkpoint_80.orbax-checkpoint-tmp').symlink_to(outside)
  _write(tmp_path, [60, 70, 80, 98, 99])
  assert layout.steps_in(tmp_path) == [10, 20, 60, 70, 80, 98, 99]
  assert 'checkpoint_99 was moved to' in caplog.text
  assert list(outside.iterdir()) == [outside / 'file']
  _assert_equal(_restore(tmp_path)[0].state, 99)


def test_links_are_read_and_not_followed_to_remove_or_move(tmp_path):
  run, outside = tmp_path / 'run', tmp_path / 'outside'
  outside.mkdir()
  _write(run, [10, 20])
  (run / 'checkpoint_10').rename(outside / 'checkpoint_10')
  (run / 'checkpoint_10').symlink_to(outside / 'checkpoint_10')
  (run / 'damaged').symlink_to(outside)
  _truncate(_largest(run / 'checkpoint_20' / 'state'))
  _assert_equal(_restore(run)[0].state, 10)
  assert (run / 'damaged.1' / 'checkpoint_20').is_dir()
  _write(run, [30, 40], keep=1)
  assert layout.steps_in(run) == [10, 40]
  assert [p.name for p in outside.iterdir()] == ['checkpoint_10']
  assert layout.read_metadata(outside / 'checkpoint_10')['note'] == 10


def test_damage_twice_keeps_both(tmp_path):
  for _ in range(2):
    _write(tmp_path, [20] if (tmp_path / 'checkpoint_10').exists() else [10, 20])
    _truncate(tmp_path / 'checkpoint_20' / 'metadata' / 'metadata')
    _restore(tmp_path)
  assert sorted(p.name for p in (tmp_path / 'damaged').iterdir()) == [
    'checkpoint_20',
    'checkpoint_20.1',
  ]


def test_two_damaged_checkpoints(tmp_path, caplog):
  _write(tmp_path, [10, 20, 30])
  for step in ('20', '30'):
    _truncate(_largest(tmp_path / f'checkpoint_{step}' / 'state'))
  _assert_equal(_restore(tmp_path)[0].state, 10)
  assert 'step 20 is damaged' in caplog.text and 'step 30 is damaged' in caplog.text


def test_if_none_can_be_read_nothing_is_moved(tmp_path):
  _write(tmp_path, [10, 20])
  for step in ('10', '20'):
    _truncate(_largest(tmp_path / f'checkpoint_{step}' / 'state'))
  with pytest.raises(CheckpointError, match='No checkpoint in .* can be read .*train.model_dir'):
    _restore(tmp_path)
  assert layout.steps_in(tmp_path) == [10, 20]


def test_other_data_is_no_damage(tmp_path):
  _write(tmp_path, [10])
  with pytest.raises(ConfigError, match='split'):
    _restore(tmp_path, _batches('another'))
  assert layout.steps_in(tmp_path) == [10]


def test_what_an_interrupted_save_left_is_cleared(tmp_path):
  _write(tmp_path, [10])
  leftover = tmp_path / 'checkpoint_20.orbax-checkpoint-tmp-1' / 'state'
  leftover.mkdir(parents=True)
  assert layout.steps_in(tmp_path) == [10]
  _write(tmp_path, [20])
  assert not leftover.exists()
  _assert_equal(_restore(tmp_path)[0].state, 20)


@pytest.mark.parametrize('part', ['position', 'arrays'])
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, part):
  _write(tmp_path, [10])
  batches = _batches()

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  if part == 'position':
    monkeypatch.setattr(TrainingIterator, 'save', full)
  else:
    serialization = 'orbax.checkpoint._src.serialization'
    monkeypatch.setattr(f'{serialization}.tensorstore_utils.build_array_write_spec', full)
  with pytest.raises(CheckpointError) as caught, _open(tmp_path) as opened:
    opened.restore(_abstract(), batches)
    opened.save(20, _state(20), batches, {})
    opened.wait()
  message = str(caught.value)
  assert 'step 20' in message and 'No space left on device' in message
  assert 'step 10 is complete' in message and '\n' not in message
  monkeypatch.undo()
  assert layout.steps_in(tmp_path) == [10]
  _write(tmp_path, [20])
  _assert_equal(_restore(tmp_path)[0].state, 20)


def test_newest_metadata_needs_no_readable_newest_checkpoint(tmp_path):
  assert layout.newest_metadata(tmp_path) is None
  _write(tmp_path, [10, 20])
  _truncate(tmp_path / 'checkpoint_20' / 'metadata' / 'metadata')
  step, metadata = layout.newest_metadata(tmp_path)
  assert (step, metadata['note']) == (10, 10)
