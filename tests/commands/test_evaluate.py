"""`python -m tvq_t5x.evaluate`: the run's own numbers, on any mesh, as a table and as JSON."""

import contextlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_task
from absl import flags
from util import one_device, without_vocabulary

from tvq_t5x import evaluate
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, indexed, locations, streaming, vocabularies
from tvq_t5x.standalone import run_records

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_SIZE = tiny_task.SIZES['test']
pytestmark = pytest.mark.usefixtures('cleared_gin')

# A task of SeqIO's own kind, whose sequences are separate texts.
seqio.TaskRegistry.add(
  'plain_bytes',
  source=indexed.text_source(lambda split: [b'text'], ['train', 'validation']),
  preprocessors=indexed.text_preprocessors(),
  output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
)

# Images of 2 x 4 pixels.
seqio.TaskRegistry.add(
  'tiny_images',
  source=seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
      {'targets': np.arange(72, dtype=np.int32).reshape(3, 24) + 3}
    ),
    splits=['train', 'validation', 'test'],
  ),
  preprocessors=[],
  output_features={
    'targets': seqio.Feature(vocabularies.ImageVocabulary((2, 4, 3)), add_eos=False)
  },
  task_cls=indexed.InMemoryTask,
  sequence_len=24,
)


@pytest.fixture
def call(tiny_run, capsys):
  """Evaluates the run with flags, as the command does; returns what it printed."""

  def call(*args, expected=0, mesh=one_device):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    # The run's task is not the package's own.
    own = [] if any(arg.startswith('--gin_file') for arg in args) else ['--module=tiny_task']
    values(['evaluate', *own, *args])
    capsys.readouterr()
    with mesh():
      code = evaluate.run_flags(values)
    out, err = capsys.readouterr()
    assert code == expected, err
    return err if expected else out

  return call


def _json(call, tiny_run, *args, **kwargs):
  args = f'--checkpoint={tiny_run}', '--split=test', '--json=-', *args
  return json.loads(call(*args, **kwargs))


@pytest.fixture(scope='module')
def recorded(tiny_run):
  """What the training run found on the test split."""
  records = run_records.read_records(tiny_run / 'metrics.jsonl')
  return next(r for r in records if r['split'] == 'test')


def test_the_numbers_of_the_run(call, tiny_run, recorded, tmp_path):
  path = tmp_path / 'result.json'
  table = call(f'--checkpoint={tiny_run}', '--split=test', f'--json={path}')
  found = json.loads(path.read_text())
  for name in ('bits_per_byte', 'cross_entropy', 'accuracy', 'quantization_error/layer_0_1'):
    np.testing.assert_allclose(found[name], recorded[name], rtol=1e-5)
  assert (found['tokens'], found['bytes']) == (_SIZE + 1, _SIZE)
  assert (found['task'], found['split'], found['step']) == ('tiny_bytes', 'test', 16)
  assert found['perplexity'] == pytest.approx(math.exp(found['cross_entropy']))
  head, *lines = table.splitlines()
  assert head == f'tiny_bytes, test, {tiny_run / "checkpoint_16"}'
  rows = dict(line.split() for line in lines)
  assert list(rows) == [
    'bits_per_byte', 'cross_entropy', 'perplexity', 'accuracy', 'tokens', 'bytes', 'seconds',
  ]  # fmt: skip
  assert float(rows['bits_per_byte']) == pytest.approx(recorded['bits_per_byte'], abs=1e-4)
  assert rows['tokens'] == str(_SIZE + 1)


def test_bits_of_images_are_per_dimension(call, tiny_run, tmp_path):
  bindings = (
    "MIXTURE_OR_TASK_NAME = 'tiny_images'",
    "TASK_FEATURE_LENGTHS = {'targets': 24}",
    'UPDATE_LEN = None',
  )
  # It would say that it was trained on bytes.
  run = without_vocabulary(tiny_run, tmp_path / 'run')
  args = [f'--checkpoint={run}', '--split=test']
  args += [f'--gin_bindings={binding}' for binding in bindings]
  found = json.loads(call(*args, '--json=-'))
  bits = found['cross_entropy'] / math.log(2)
  assert found['bits_per_dimension'] == pytest.approx(bits, rel=1e-6)
  assert found['dimensions'] == found['tokens'] == 72
  assert not {'bits_per_byte', 'bytes'} & set(found)
  rows = [line.split()[0] for line in call(*args).splitlines()[1:]]
  assert rows == [
    'bits_per_dimension', 'cross_entropy', 'perplexity', 'accuracy', 'tokens', 'dimensions',
    'seconds',
  ]  # fmt: skip


def test_an_older_checkpoint_and_the_default_split(call, tiny_run):
  args = f'--checkpoint={tiny_run / "checkpoint_8"}', f'--gin_file={_TINY}', '--json=-'
  found = json.loads(call(*args))
  assert (found['step'], found['split']) == (8, 'validation')
  assert found['tokens'] == tiny_task.SIZES['validation'] + 1


@pytest.mark.parametrize(
  'bindings',
  [
    ['BATCH_SIZE = 4', 'NUM_PARTITIONS = 2', 'UPDATE_LEN = 16'],
    pytest.param(
      ['BATCH_SIZE = 8', 'NUM_PARTITIONS = 8', 'PARAMETER_PARTITIONING_DIMS = 2'],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_batch_size_and_mesh_change_nothing(call, tiny_run, recorded, bindings):
  args = [f'--gin_bindings={binding}' for binding in bindings]
  found = _json(call, tiny_run, *args, mesh=contextlib.nullcontext)
  assert found['tokens'] == _SIZE + 1
  for name in ('bits_per_byte', 'cross_entropy', 'accuracy'):
    np.testing.assert_allclose(found[name], recorded[name], rtol=1e-5)


def test_modes_of_jax_change_nothing(call, tiny_run, recorded):
  with (
    jax.enable_x64(True),
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
  ):
    found = _json(call, tiny_run)
  for name in ('bits_per_byte', 'cross_entropy', 'accuracy'):
    np.testing.assert_allclose(found[name], recorded[name], rtol=1e-5)


def test_carried_state_sees_all_of_the_split(call, tiny_run, recorded):
  one = ['--gin_bindings=BATCH_SIZE = 1', '--carry_state']
  carried = _json(call, tiny_run, *one)
  length = "--gin_bindings=TASK_FEATURE_LENGTHS = {'targets': 504}"
  whole = _json(call, tiny_run, length, '--gin_bindings=UPDATE_LEN = None')
  assert carried['carry_state'] and carried['tokens'] == _SIZE + 1
  np.testing.assert_allclose(carried['cross_entropy'], whole['cross_entropy'], rtol=1e-5)
  assert abs(carried['cross_entropy'] - recorded['cross_entropy']) > 1e-4
  table = call(f'--checkpoint={tiny_run}', '--split=test', *one)
  assert table.splitlines()[0].endswith('checkpoint_16, state carried on')


def test_settings_that_change_nothing_are_told(call, tiny_run, caplog):
  bindings = (f'--gin_bindings={x}' for x in ('BATCH_SIZE = 8', 'TOP_P = 0.5', 'UPDATE_LEN = 8'))
  _json(call, tiny_run, *bindings)
  told = [r.getMessage() for r in caplog.records if 'changed nothing' in r.getMessage()]
  assert told == ['--gin.TOP_P=0.5 changed nothing: leave it out.']


@pytest.mark.parametrize(
  ('args', 'parts'),
  [
    (['--checkpoint='], ['no --checkpoint was given']),
    (['--checkpoint=nothing'], ['--checkpoint=nothing: there is no such folder']),
    (['--gin_file=nothing.gin'], ['--gin_file=nothing.gin: no such file']),
    (['--split=tset'], ["error: --split = 'tset'", 'test, train, validation']),
    (['--json=nowhere/result.json'], ['--json=nowhere/result.json: there is no folder']),
    (['--json=.'], ['--json=.: give the path of a file']),
    (['--predictions=-'], ['--predictions=-: give the path of a file']),
    (['--predictions=no/a'], ['--predictions=no/a: there is no folder']),
    (['--predictions=a'], ['--predictions=a is for classifiers', 'TransformerVQModel']),
    (['--gin_bindings=BATCH_SIZE = 3'], ['batch_size = 3 (macro BATCH_SIZE)', 'multiple of']),
    (['--gin_bindings=BATCH_SZIE = 8'], ['BATCH_SZIE', 'did you mean BATCH_SIZE']),
    (['--gin_bindings=NUM_PARTITIONS = 3'], ['Partitioner.num_partitions = 3']),
    (['--gin_bindings=config.TransformerConfig.emb_dim = 32'], ['there [1, 16, 1, 8]']),
    (
      ["--gin_bindings=MIXTURE_OR_TASK_NAME = 'plain_bytes'", '--carry_state'],
      ['--carry_state', 'plain_bytes'],
    ),
  ],
)
@pytest.mark.usefixtures('_unread')
def test_mistakes_are_one_line(call, tiny_run, compiled, args, parts):
  args = f'--checkpoint={tiny_run}', *args
  message = call(*args, expected=2, mesh=contextlib.nullcontext)
  assert message.startswith('error: ')
  for part in parts:
    assert part in message
  assert not compiled
  assert len(message.splitlines()) == 1


@pytest.fixture
def _unread(monkeypatch):
  """Fails where a split is read: of a large corpus, that takes hours."""

  def read(*args):
    raise AssertionError('read')

  for module in (datasets, streaming):
    monkeypatch.setattr(module, 'evaluation_batches', read)


def test_what_needs_no_data_is_said_before_it_is_looked_for(call, tiny_run, monkeypatch):
  def find(self, split):
    raise ConfigError('there is no data')

  monkeypatch.setattr(indexed.IndexedTask, 'find', find)
  for args, part in (
    (['BATCH_SIZE = 3'], 'macro BATCH_SIZE'),
    (['UPDATE_LEN = 12'], 'UPDATE_LEN'),
    (
      ["train_eval/datasets.DatasetConfig.mixture_or_task_name = 'tiny_images'"],
      'TransformerVQModel.vocabulary',
    ),
    ([], 'there is no data'),
  ):
    args = [f'--gin_bindings={binding}' for binding in args]
    message = call(f'--checkpoint={tiny_run}', *args, expected=2, mesh=contextlib.nullcontext)
    assert part in message


def test_a_folder_of_data(call, tiny_run, tmp_path, monkeypatch):
  monkeypatch.setenv('TVQ_DATA_DIR', '')
  message = call(f'--checkpoint={tiny_run}', '--data_dir=no', expected=2)
  assert message.startswith('error: --data_dir=no: there is no such folder')
  message = call(f'--checkpoint={tiny_run}', f'--data_dir={tmp_path}', expected=2)
  assert message.startswith(f'error: --data_dir={tmp_path}: the data does not come from there')
  assert locations.data_path('PG19_PATH', None) is None  # The next call has a folder of its own.


def test_a_damaged_checkpoint_is_another_exit_code(call, tiny_run, tmp_path):
  folder = tmp_path / 'checkpoint_16'
  (folder / 'state').mkdir(parents=True)
  (tmp_path / 'config.gin').write_text((tiny_run / 'config.gin').read_text())
  message = call(f'--checkpoint={folder}', expected=1)
  assert message.startswith(f'error: The checkpoint {folder} can not be read')
