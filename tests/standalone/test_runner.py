"""Whole runs: what they write, and that an interruption of any kind changes none of it."""

import contextlib
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing import event_accumulator, event_file_loader
from tensorboard.compat.proto import event_pb2
from tensorboard.util.tensor_util import make_ndarray
from util import next_batch

from tvq_t5x import train
from tvq_t5x.checkpoints import layout
from tvq_t5x.data import datasets
from tvq_t5x.gin_support import parsing
from tvq_t5x.standalone import loop, run_log, run_records
from tvq_t5x.standalone.signals import StopSignals
from tvq_t5x.training.optimizers import warmup_cosine

_TESTS = pathlib.Path(__file__).parents[1]
_GIN = str(_TESTS / 'tiny.gin')
pytestmark = pytest.mark.usefixtures('logged')
_STEPS = 40
_KILLED_IN_SAVE = """
import os, signal, sys
from tvq_t5x.data import datasets
from tvq_t5x import train

save, saves = datasets.TrainingIterator.save, []

def killed(self, directory):
  saves.append(directory)
  save(self, directory)
  if len(saves) == 4:
    os.kill(os.getpid(), signal.SIGKILL)

datasets.TrainingIterator.save = killed
train.run([sys.argv[1]], sys.argv[2:])
"""


def _bindings(model_dir, **macros):
  macros = {'MODEL_DIR': str(model_dir), **macros}
  return [f'{name} = {value!r}' for name, value in macros.items()]


def _run(model_dir, *bindings, dry_run=False, **macros):
  return train.run([_GIN], [*_bindings(model_dir, **macros), *bindings], dry_run=dry_run)


_NAME = 'run ]{1}$HOME%20#$$_^,;&|~é'  # Of a folder, with what means something to some program.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An undisturbed run."""
  folder = tmp_path_factory.mktemp('whole') / _NAME
  assert _run(folder) == 0
  return folder


@pytest.fixture
def copied(whole, tmp_path):
  """A copy of the undisturbed run, to be changed."""
  return shutil.copytree(whole, tmp_path / _NAME)


def _records(folder):
  return run_records.read_records(folder / 'metrics.jsonl')


def _comparable(folder):
  """The records less what depends on the clock, in the order of steps."""
  records = [{k: v for k, v in r.items() if k != 'tokens_per_second'} for r in _records(folder)]
  return sorted(records, key=lambda r: (r['step'], r['split']))


def _arrays(folder, step):
  path = folder / f'checkpoint_{step}' / 'state'
  return ocp.StandardCheckpointer().restore(path)


def _assert_same_end(folder, expected):
  """Bit for bit the parameters, optimizer state, codebooks, data position, metrics, samples."""
  steps = layout.steps_in(expected)
  assert layout.steps_in(folder)[-1] == steps[-1]
  jax.tree.map(
    np.testing.assert_array_equal, _arrays(folder, steps[-1]), _arrays(expected, steps[-1])
  )
  assert _comparable(folder) == _comparable(expected)
  for split in ('train', 'validation', 'test'):
    assert sorted(_events(folder, split)) == sorted(_events(expected, split))
  assert next_batch(folder, steps[-1]) == next_batch(expected, steps[-1])
  for path in expected.glob('samples/*'):
    assert (folder / 'samples' / path.name).read_text() == path.read_text()


def test_everything_is_written(whole):
  names = {path.name for path in whole.iterdir()}
  assert {'checkpoint_40', 'config.gin', 'curve.png', 'metrics.jsonl', 'samples'} <= names
  assert (whole / 'curve.png').read_bytes().startswith(b'\x89PNG')
  assert (whole / 'curve.pdf').read_bytes().startswith(b'%PDF')
  samples = sorted(path.name for path in whole.glob('samples/*'))
  assert samples == ['00000020.txt', '00000040.txt']
  parsing.parse_gin([str(whole / 'config.gin')], [])


def test_metrics_are_recorded_once_a_period(whole):
  records = _records(whole)
  steps = {
    split: [r['step'] for r in records if r['split'] == split]
    for split in ('train', 'validation', 'test')
  }
  assert steps == {'train': list(range(4, 41, 4)), 'validation': [20, 40], 'test': [40]}
  health = ('codebook_perplexity', 'codebook_dead_codes', 'quantization_error')
  names = {f'{name}/layer_0_{i}' for name in health for i in (0, 1)}
  names |= {'loss', 'cross_entropy', 'bits_per_byte', 'accuracy', 'gradient_norm', 'commit_loss'}
  schedule = warmup_cosine(1e-2, 4, _STEPS)
  for record in records:
    assert record['tokens'] == record['step'] * 8 * 32
    if record['split'] == 'train':
      assert names <= record.keys()
      assert record['learning_rate'] == pytest.approx(float(schedule(record['step'] - 1)))
      assert record['tokens_per_second'] > 0
    assert all(map(math.isfinite, (v for v in record.values() if isinstance(v, float))))
  assert records[-1]['bits_per_byte'] < records[1]['bits_per_byte']


def test_tensorboard_has_the_same(whole):
  for split in ('train', 'validation', 'test'):
    events = event_accumulator.EventAccumulator(str(whole / 'tensorboard' / split))
    events.Reload()
    for record in _records(whole):
      if record['split'] == split:
        values = {e.step: tf_value(e) for e in events.Tensors('bits_per_byte')}
        assert values[record['step']] == pytest.approx(record['bits_per_byte'], rel=1e-6)
    if split == 'train':
      assert 'codebook_perplexity/layer_0_1' in events.Tags()['tensors']
    if split == 'validation':
      usage = {e.step: make_ndarray(e.tensor_proto) for e in events.Tensors('code_usage/layer_0_1')}
      assert sorted(usage) == [20, 40] and usage[40][:, 2].sum() == 8  # Of 8 codes.
      assert {'sample/0', 'code_usage/layer_0_0'} <= set(events.Tags()['tensors'])
    if split != 'train':
      assert [e.step for e in events.Tensors('curve')][-1] == 40


def tf_value(event):
  return float(make_ndarray(event.tensor_proto))


def test_the_latest_checkpoints_and_the_best_are_kept(whole):
  # When the last one was saved, step 20 was the only one that had been evaluated.
  assert layout.steps_in(whole) == [20, 36, 40]


def test_the_best_step_is_that_of_the_lowest_validation_loss(tmp_path):
  with run_log.RunLog(tmp_path) as log:
    assert log.best_step() is None
    for step, loss in ((1, math.nan), (2, 3.0), (3, 1.0), (4, 2.0)):
      log.write('validation', step, {'cross_entropy': loss})
    log.write('train', 5, {'cross_entropy': 0.0})
    assert log.best_step() == 3


def test_records_after_the_checkpoint_are_written_anew(tmp_path):
  with run_log.RunLog(tmp_path) as log:
    for step in (1, 2, 3):
      log.write('train', step, {'loss': math.nan if step == 1 else 1.0})
      log.write_samples(step, ['text'])
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 4, "spl')  # Cut short by a kill.
  with run_log.RunLog(tmp_path) as log:
    log.go_on_after(2)
    assert [r['step'] for r in log.records()] == [1, 2]
    assert math.isnan(log.record('train', 1)['loss'])
    assert log.has_samples(2) and not log.has_samples(3)
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2


def _events(folder, split):
  """Step and value of each loss in TensorBoard's files, as they lie there."""
  found = []
  for path in sorted((folder / 'tensorboard' / split).glob('events.*')):
    for event in event_file_loader.RawEventFileLoader(str(path)).Load():
      event = event_pb2.Event.FromString(event)
      values = [v for v in event.summary.value if v.tag == 'cross_entropy']
      found += [(event.step, float(make_ndarray(v.tensor))) for v in values]
  return found


def test_events_after_the_checkpoint_are_written_anew(tmp_path):
  with run_log.RunLog(tmp_path) as log:
    for step in (1, 2, 3):
      log.write('train', step, {'cross_entropy': step})
      log.write('validation', step, {'cross_entropy': step})
  with next((tmp_path / 'tensorboard' / 'train').iterdir()).open('ab') as f:
    f.write(b'cut short')  # By a kill.
  outside = tmp_path / 'outside'
  (tmp_path / 'tensorboard' / 'validation').rename(outside)
  (tmp_path / 'tensorboard' / 'validation').symlink_to(outside)
  with run_log.RunLog(tmp_path) as log:
    log.go_on_after(2)
    log.write('train', 3, {'cross_entropy': 7})
  assert _events(tmp_path, 'train') == [(1, 1.0), (2, 2.0), (3, 7.0)]
  assert _events(tmp_path, 'validation') == [(1, 1.0), (2, 2.0), (3, 3.0)]
  assert not list(tmp_path.glob('tensorboard/train/incomplete*'))


def test_a_finished_run_says_so(copied, whole, caplog):
  before = (copied / 'metrics.jsonl').read_text()
  assert _run(copied) == 0
  assert f'is finished: step {_STEPS} of {_STEPS}' in caplog.text
  assert f'{_records(whole)[-1]["bits_per_byte"]:.4f}' in caplog.text
  assert 'Compiled' not in caplog.text
  assert (copied / 'metrics.jsonl').read_text() == before


# Interruptions


def _started(args):
  env = {**os.environ, 'PYTHONPATH': str(_TESTS)}
  command = [sys.executable, *args]
  return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _killed(process):
  """Waits until it is."""
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(120)
  process.kill()
  log = process.stderr.read().decode()
  assert process.returncode == -signal.SIGKILL, log
  assert 'step 4/40' in log  # From Python, too.


def _wait_for_step(folder, step, process):
  end = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < end:
    if (layout.steps_in(folder) or [-1])[-1] >= step:
      return
    time.sleep(0.01)
  raise AssertionError(f'no checkpoint of step {step}: {process.stderr.read()}')


def _assert_it_goes_on(folder, whole, caplog):
  last = layout.steps_in(folder)[-1]
  assert 0 < last < _STEPS
  assert _run(folder) == 0
  assert f'Continuing from the checkpoint of step {last}.' in caplog.text
  _assert_same_end(folder, whole)


def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(whole, tmp_path, caplog):
  folder = tmp_path / 'run'
  seed = int.from_bytes(os.urandom(4), 'big')
  print(f'seed of the moment of the kill: {seed}')
  target = random.Random(seed).randrange(4, 30)
  delay = random.Random(seed).uniform(0.0, 0.1)
  flags = [f'--gin_bindings={b}' for b in _bindings(folder)]
  process = _started(['-m', 'tvq_t5x.train', f'--gin_file={_GIN}', *flags])
  try:
    _wait_for_step(folder, target, process)
    time.sleep(delay)
  finally:
    process.kill()
  _killed(process)
  _assert_it_goes_on(folder, whole, caplog)


@pytest.mark.slow
def test_a_run_killed_in_a_save_ends_bit_for_bit_like_an_undisturbed_one(whole, tmp_path, caplog):
  folder = tmp_path / 'run'
  _killed(_started(['-c', _KILLED_IN_SAVE, _GIN, *_bindings(folder)]))
  # The killed save has left a part of itself, which does not count.
  assert layout.steps_in(folder)[-1] == 12
  assert any('tmp' in path.name for path in folder.iterdir())
  _assert_it_goes_on(folder, whole, caplog)


@pytest.mark.slow
def test_signals_save_and_the_run_continues(whole, tmp_path, monkeypatch, caplog, interruptible):
  folder = tmp_path / 'run'
  # Within a window of training metrics, and at a step without a checkpoint of its own.
  batches, count = datasets.TrainingIterator.__next__, []

  def in_training(self):
    count.append(1)
    if len(count) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return batches(self)

  with monkeypatch.context() as patch:
    patch.setattr(datasets.TrainingIterator, '__next__', in_training)
    assert _run(folder) == 128 + signal.SIGTERM
  assert layout.steps_in(folder)[-1] == 10
  assert f'Stopped by SIGTERM after step 10 of {_STEPS}' in caplog.text
  assert 'The same command continues' in caplog.text

  evaluation_batches, count = datasets.evaluation_batches, []

  def in_evaluation(*args):
    for batch in evaluation_batches(*args):
      count.append(1)
      os.kill(os.getpid(), signal.SIGINT)
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(loop.datasets, 'evaluation_batches', in_evaluation)
    assert _run(folder) == 128 + signal.SIGINT
  assert len(count) == 1
  assert layout.steps_in(folder)[-1] == 20
  assert {r['split'] for r in _records(folder)} == {'train'}

  assert _run(folder) == 0
  _assert_same_end(folder, whole)


@pytest.mark.slow
def test_carried_state_is_saved(tmp_path, caplog):
  macros = {'CARRY_STATE': True, 'TRAIN_STEPS': 8, 'EVAL_PERIOD': 8, 'SAMPLE_PERIOD': 8}
  whole, folder = tmp_path / 'whole', tmp_path / 'run'
  assert _run(whole, **macros, CHECKPOINT_PERIOD=4) == 0
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / 'checkpoint_8')
  assert _run(folder, **macros, CHECKPOINT_PERIOD=4) == 0
  assert 'Continuing from the checkpoint of step 4.' in caplog.text
  arrays = _arrays(folder, 8)
  jax.tree.map(np.testing.assert_array_equal, arrays, _arrays(whole, 8))
  # Eight batches of 32 tokens a row.
  np.testing.assert_array_equal(arrays['flax_mutables']['carried']['position'], 8 * 32)
  assert _run(folder, TRAIN_STEPS=8) == 2  # No carried state to continue with.


def test_a_second_interrupt_interrupts():
  # A shell's background jobs start with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    os.kill(os.getpid(), signal.SIGINT)
  assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.received is None
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_handler_from_c_is_no_obstacle(monkeypatch):
  before, install = signal.getsignal(signal.SIGTERM), signal.signal
  # Python says None of such a handler.
  monkeypatch.setattr(signal, 'signal', lambda number, new: install(number, new) and None)
  try:
    with StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  finally:
    install(signal.SIGTERM, before)


def test_nobody_has_to_read_that_it_stops():
  terminal = os.dup(2)
  read, write = os.pipe()
  os.close(read)
  try:
    os.dup2(write, 2)
    with StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.received == signal.SIGTERM
  finally:
    os.dup2(terminal, 2)
    for number in (write, terminal):
      os.close(number)


def test_samples_do_not_control_the_terminal(tmp_path, caplog):
  text = 'a\tb\n\x1b[2J\x07\r\x9b é'
  with run_log.RunLog(tmp_path) as log:
    log.write_samples(1, [text])
  assert 'a\tb\n\\x1b[2J\\x07\\r\\x9b é' in caplog.text
  assert (tmp_path / 'samples' / '00000001.txt').read_bytes() == f'{text}\n'.encode()


def test_a_truncated_newest_checkpoint_is_named(copied, whole, caplog):
  state = copied / f'checkpoint_{_STEPS}' / 'state'
  for path in state.rglob('d/*'):
    os.truncate(path, path.stat().st_size // 2)
  assert _run(copied) == 0
  assert f'step {_STEPS} is damaged' in caplog.text
  assert 'Continuing from the checkpoint of step 36.' in caplog.text
  _assert_same_end(copied, whole)


def test_a_run_that_diverges_stops_after_its_metrics(tmp_path, capsys):
  folder = tmp_path / 'run'
  assert _run(folder, PEAK_LEARNING_RATE=1e30, WARMUP_STEPS=3, CHECKPOINT_PERIOD=2) == 1
  message = capsys.readouterr().err
  assert message.startswith('error: Training diverged at step ')
  step = int(message.split('at step ')[1].split(':')[0])
  assert 'lower learning rate' in message and str(folder / 'metrics.jsonl') in message
  last = _records(folder)[-1]
  assert last['step'] == step and last['split'] == 'train'
  steps = layout.steps_in(folder)
  assert all(s < step for s in steps)
  for saved in steps:
    finite = jax.tree.map(lambda x: np.isfinite(x).all(), _arrays(folder, saved)['target'])
    assert all(jax.tree.leaves(finite))


@pytest.mark.slow
def test_a_run_on_the_kjv(tmp_path, caplog):
  """The quick start, made small: its model, task and files."""
  macros = {
    'TRAIN_STEPS': 8,
    'WARMUP_STEPS': 2,
    'LOG_PERIOD': 4,
    'UPDATE_LEN': 128,
    'BATCH_SIZE': 8,
  }
  macros['TASK_FEATURE_LENGTHS'] = {'targets': 256}
  sizes = [
    "remat = 'none'",
    'emb_dim = 16',
    'key_dim = 8',
    'value_dim = 16',
    'num_layers = 1',
    'num_codes = 8',
  ]
  bindings = [f'config.TransformerConfig.{size}' for size in sizes]
  bindings += ['train_eval/datasets.DatasetConfig.batch_size = 256', 'SampleConfig.length = 32']
  folder = tmp_path / 'runs' / 'kjv'
  assert train.run(['gin/kjv_tiny.gin'], [*_bindings(folder, **macros), *bindings]) == 0
  splits = [r['split'] for r in _records(folder)]
  assert splits == ['train', 'train', 'validation', 'test']
  assert (folder / 'curve.png').exists() and len(list(folder.glob('samples/*'))) == 1
  assert 'Finished, step 8, test: bits_per_byte' in caplog.text


def test_images_are_a_grid_in_a_file(tmp_path, caplog):
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
  with run_log.RunLog(tmp_path) as log:
    assert not log.has_samples(5)
    log.write_samples(5, images)
    assert log.has_samples(5)
  path = tmp_path / 'samples' / '00000005.png'
  assert path.read_bytes().startswith(b'\x89PNG') and str(path) in caplog.text
  with run_log.RunLog(tmp_path) as log:
    log.go_on_after(4)
    assert not log.has_samples(5)
