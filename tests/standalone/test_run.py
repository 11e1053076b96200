"""A run from Python: training, tables, curves, and what is refused."""

import asyncio
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from util import one_device

import tvq_t5x
from tvq_t5x import Run
from tvq_t5x.common.errors import ConfigError, Stopped
from tvq_t5x.standalone import profiling, run_records, runner
from tvq_t5x.standalone.run import Table

TESTS = pathlib.Path(__file__).parents[1]
TINY = TESTS / 'tiny.gin'
SETTINGS = ['TRAIN_STEPS = 16', 'CHECKPOINT_PERIOD = 8', 'runner.train.sample_cfg = None']
pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of a finished run."""
  return Run(shutil.copytree(tiny_run, tmp_path / 'tiny run'))


def test_a_call_trains_within_an_event_loop_and_returns_the_run(run, capfd):
  async def cell():
    with one_device():
      return tvq_t5x.train_model(TINY, run.model_dir, SETTINGS)

  again = asyncio.run(cell())
  assert again.model_dir == run.model_dir
  assert tvq_t5x.load(again, modules=['tiny_task']).loaded.step == 16


@pytest.mark.parametrize(
  ('setting', 'said'),
  [
    ('WARMUP_STEPS = 100', r'^warmup_cosine.warmup_steps = 100 \(macro WARMUP_STEPS\) is not acc'),
    ('TransformerConfig.emb_dim = 33', '^TransformerConfig.emb_dim = 33 is not accepted: [^\n]*$'),
  ],
)
def test_what_gin_calls_refuses_in_words_too(run, tmp_path, setting, said):
  with one_device(), pytest.raises(ConfigError, match=said):
    tvq_t5x.train_model(TINY, tmp_path / 'run', [setting])
  with pytest.raises(ConfigError, match=said):
    tvq_t5x.load(run, gin_bindings=[setting], modules=['tiny_task'])


def test_a_folder_of_data_is_of_one_call(tmp_path, monkeypatch):
  monkeypatch.delenv('TVQ_DATA_DIR', raising=False)
  (tmp_path / 'a.txt').write_text('in the beginning ' * 500)
  settings = ['TRAIN_STEPS = 8']
  with one_device(), pytest.raises(ConfigError, match='warmup_steps = 100'):
    tvq_t5x.train_model('gin/text_tiny.gin', tmp_path / 'run', settings, data_dir=tmp_path)
  with one_device(), pytest.raises(ConfigError, match='TEXT_FILES is not set'):
    tvq_t5x.train_model('gin/text_tiny.gin', tmp_path / 'run')


def test_only_runs_are_drawn_beside_a_run(run):
  for beside in ('runs/other', [3]):
    with pytest.raises(ConfigError, match='^beside = .* give a list of runs, such as'):
      run.plot(beside=beside)


def test_tables_have_what_was_recorded(run):
  records = run_records.read_records(run.model_dir / 'metrics.jsonl')
  for split in ('train', 'validation', 'test'):
    expected = [r for r in records if r['split'] == split]
    table = run.metrics(split)
    assert table.num_rows == len(expected)
    assert table['step'].tolist() == [r['step'] for r in expected]
    name = 'codebook_perplexity/layer_0_1'
    assert table[name].tolist() == [r[name] for r in expected]
  assert isinstance(table, dict)  # As pandas wants it.
  assert f'{records[-1]["bits_per_byte"]:.4f}' in repr(run) and 'step 16' in repr(run)


def test_long_tables_show_both_ends():
  table = Table({'step': np.arange(1, 31), 'loss': np.linspace(3, 1, 30), 'x/y': np.zeros(30)})
  lines = repr(table).splitlines()
  assert lines[0].split() == ['step', 'loss', '(1', 'more', 'columns)']
  assert [line.split()[0] for line in lines[1:]] == [
    *map(str, range(1, 6)), '...', *map(str, range(26, 31)),
  ]  # fmt: skip
  assert table._repr_html_().count('<tr>') == 12
  assert repr(Table()) == ''


def test_what_is_missing_in_a_row_is_nan(tmp_path):
  lines = ['{"step": 1, "split": "train", "loss": 2.0}', '{"step": 2, "split": "train", "x": 1.5}']
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  table = Run(tmp_path).metrics('train')
  np.testing.assert_array_equal(table['loss'], [2.0, np.nan])
  np.testing.assert_array_equal(table['x'], [np.nan, 1.5])


def test_curves_in_place_and_in_files(run, tmp_path):
  curves = run.plot()
  assert matplotlib_image.imread(io.BytesIO(curves._repr_png_())).shape[1] > 400
  curves.save(tmp_path / 'curves.svg')
  text = (tmp_path / 'curves.svg').read_text()
  assert 'tiny run' in text and 'bits per byte' in text
  other = Run(shutil.copytree(run.model_dir, tmp_path / 'other' / 'tiny run'))
  run.plot('accuracy', beside=[other]).save(tmp_path / 'two.svg')
  text = (tmp_path / 'two.svg').read_text()
  assert str(run.model_dir) in text and str(other.model_dir) in text  # Their names are the same.


def test_refusals(run, tmp_path):
  with pytest.raises(ConfigError, match='is no folder of a run: there is no .*metrics.jsonl'):
    Run(tmp_path / 'nothing')
  with pytest.raises(ConfigError, match="split = 'valid' is not accepted: give one of 'train'"):
    run.metrics('valid')
  with pytest.raises(ConfigError, match="no metric 'wer', but accuracy"):
    run.plot('wer')
  with pytest.raises(ConfigError, match=r'one that ends in .png or .pdf or .svg'):
    run.plot().save(tmp_path / 'curve.jpg')
  with pytest.raises(ConfigError, match="gin_bindings = 'TRAIN_STEPS = 8' .* a list of texts"):
    tvq_t5x.train_model(TINY, tmp_path / 'x', 'TRAIN_STEPS = 8')  # pyright: ignore
  with pytest.raises(ConfigError, match='gin_file = None is not accepted: give a path'):
    tvq_t5x.train_model(None, tmp_path / 'x')  # pyright: ignore
  with pytest.raises(ConfigError, match='UPDATE_LEN'):  # The macro that sets what is wrong.
    tvq_t5x.train_model(TINY, tmp_path / 'x', ['UPDATE_LEN = 20'])
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopping_is_an_exception(tmp_path, monkeypatch, number):
  def stop(*unused):
    raise Stopped(number)

  monkeypatch.setattr(runner, 'run', stop)
  with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped):
    tvq_t5x.train_model(TINY, tmp_path / 'run')


@pytest.mark.parametrize(
  ('steps', 'words'),
  [
    (0, '--profile = 0 is not accepted: give a whole number of updates, at least 1'),
    (3, '--profile = 3 is not accepted: give a multiple of 2, the updates of a batch'),
    (40, '--profile = 40 .* at most 36: of 40 updates 0 are done'),
  ],
)
def test_a_trace_that_can_not_be_made(tmp_path, steps, words):
  with one_device(), pytest.raises(ConfigError, match=words):
    tvq_t5x.train_model(TINY, tmp_path / 'run', profile=steps)
  assert not (tmp_path / 'run').exists()


def test_no_trace_of_a_finished_run_or_a_dry_run(run, capsys):
  with one_device(), pytest.raises(ConfigError, match='of at least 22: of 16 updates 16 are done'):
    tvq_t5x.train_model(TINY, run.model_dir, SETTINGS, profile=2)
  assert tvq_t5x.train.run([str(TINY)], ["MODEL_DIR = 'x'"], dry_run=True, profile=2) == 2
  assert '--profile=2: a dry run trains nothing' in capsys.readouterr().err


@pytest.mark.parametrize(('platforms', 'found'), [('', '0.0.1'), ('cpu', '0.0.1'), ('', None)])
def test_a_libtpu_that_would_end_the_process(monkeypatch, platforms, found):
  def version(name):
    if found is None:
      raise profiling.metadata.PackageNotFoundError(name)
    return found

  monkeypatch.setattr(profiling.metadata, 'version', version)
  monkeypatch.setattr(
    profiling.metadata, 'requires', lambda name: ['libtpu==0.0.42.*; extra == "t"']
  )
  config = types.SimpleNamespace(jax_platforms=platforms)
  fake = types.SimpleNamespace(config=config, __version__='0.10.2')
  monkeypatch.setattr(profiling, 'jax', fake)
  if platforms or not found:
    profiling._check_libtpu()
  else:
    with pytest.raises(ConfigError, match='libtpu 0.0.1 is installed.* Set JAX_PLATFORMS=cpu'):
      profiling._check_libtpu()


@pytest.mark.slow
def test_a_trace_is_left(tmp_path):
  folder = tmp_path / 'run'
  flags = [f'--gin_file={TINY}', f'--gin.MODEL_DIR="{folder}"', '--profile=4']
  flags += [f'--gin_bindings={x}' for x in ('TRAIN_STEPS = 12', 'EVAL_PERIOD = None')]
  done = subprocess.run(
    [sys.executable, '-m', 'tvq_t5x.train', *flags],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(TESTS)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert f'Steps 5 to 8 are traced in {folder / "profile"}.' in done.stderr
  (trace,) = folder.glob('profile/plugins/profile/*/*.xplane.pb')
  assert b'train_step' in trace.read_bytes()
