"""A checkpoint of either engine gives its parameters on any mesh, or says what is wrong."""

import functools
import logging
import pathlib
import shutil

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.standalone import configuration

# The run's task is not the package's own.
load = functools.partial(configuration.load, modules=['tiny_task'])

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


@pytest.fixture
def copied(tiny_run, tmp_path):
  """A copy of the run, to be changed."""
  return shutil.copytree(tiny_run, tmp_path / 'run')


@pytest.fixture
def of_t5x(copied):
  """A MODEL_DIR as T5X leaves it: no metadata, no position, and its own config.gin."""
  for step in (8, 16):
    shutil.rmtree(copied / f'checkpoint_{step}' / 'metadata')
    shutil.rmtree(copied / f'checkpoint_{step}' / 'dataset')
  config = 'from __gin__ import dynamic_registration\nfrom t5x import utils\n'
  (copied / 'config.gin').write_text(config)
  return copied


def _saved(folder, step):
  return ocp.PyTreeCheckpointer().restore(folder / f'checkpoint_{step}' / 'state')['target']


def _assert_parameters(loaded, expected):
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
  assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {'float32'}


def test_the_newest_checkpoint_and_the_config_of_its_run(tiny_run):
  loaded = load(str(tiny_run))
  assert loaded.checkpoint == tiny_run / 'checkpoint_16' and loaded.step == 16
  _assert_parameters(loaded, _saved(tiny_run, 16))


def test_a_given_checkpoint_from_a_relative_path(tiny_run, monkeypatch):
  monkeypatch.chdir(tiny_run)
  loaded = load('checkpoint_8')
  assert loaded.checkpoint == tiny_run / 'checkpoint_8' and loaded.step == 8
  _assert_parameters(loaded, _saved(tiny_run, 8))


def test_parameters_lie_as_the_mesh_wants(tiny_run):
  loaded = load(str(tiny_run), gin_bindings=['NUM_PARTITIONS = 2'])
  table = loaded.params['token_embedder']['embedding']
  assert table.sharding.spec == PartitionSpec('model', None)
  assert dict(table.sharding.mesh.shape) == {'data': 4, 'model': 2}
  _assert_parameters(loaded, _saved(tiny_run, 16))


def test_a_checkpoint_of_t5x(of_t5x):
  _assert_parameters(configuration.load(str(of_t5x), [_TINY]), _saved(of_t5x, 16))


def test_the_config_of_t5x_is_not_enough(of_t5x):
  with pytest.raises(ConfigError) as error:
    load(str(of_t5x))
  message = str(error.value)
  assert 'config.gin was written by T5X' in message and '--gin_file' in message


@pytest.mark.parametrize(
  ('checkpoint', 'part'),
  [
    ('nothing', 'there is no such folder'),
    ('', 'checkpoint_N'),
    ('gs://bucket/run', 'on a local disk'),
    ('file', 'there is no such folder'),
    ('empty', 'there is no checkpoint in it'),
  ],
)
def test_no_checkpoint(tmp_path, monkeypatch, checkpoint, part):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('file').write_text('')
  pathlib.Path('empty').mkdir()
  with pytest.raises(ConfigError) as error:
    configuration.load(checkpoint, [_TINY])
  message = str(error.value)
  assert message.startswith(f'checkpoint={checkpoint}:') and part in message
  assert '\n' not in message


def test_a_folder_without_config(copied):
  (copied / 'config.gin').unlink()
  with pytest.raises(ConfigError, match='has no config.gin: .* --gin_file'):
    load(str(copied))


def test_gin_files_that_describe_no_run(tiny_run, tmp_path):
  path = tmp_path / 'macro.gin'
  path.write_text(
    'from __gin__ import dynamic_registration\nfrom tvq_t5x import datasets\n'
    'datasets.vocabulary.mixture_or_task_name = %MODEL_DIR\n'
  )
  with pytest.raises(ConfigError, match='describe no run: .*gin/runs/pretrain.gin'):
    configuration.load(str(tiny_run), [str(path)])


@pytest.mark.parametrize(
  ('setting', 'parts'),
  [
    ('emb_dim = 32', ['layers/attention_0/distance/kernel is [1, 32, 1, 8], there [1, 16, 1, 8]']),
    ('num_layers = 2', ['layers/attention_0/content_bias is [2, 1, 8], there [1, 1, 8]']),
    ('scan_layers = False', ['layers/attention_0/content_bias is missing, there [1, 1, 8]']),
  ],
)
def test_another_size_is_refused_naming_the_arrays(tiny_run, setting, parts):
  with pytest.raises(ConfigError) as error:
    load(str(tiny_run), gin_bindings=[f'config.TransformerConfig.{setting}'])
  message = str(error.value)
  for part in (*parts, f'--checkpoint={tiny_run / "checkpoint_16"}', 'more arrays'):
    assert part in message
  assert '\n' not in message and message.count(', there ') == 3


def test_settings_that_no_array_shows_are_told(tiny_run, caplog):
  caplog.set_level(logging.WARNING, logger='absl')
  load(str(tiny_run), gin_bindings=['config.TransformerConfig.window_len = 16'])
  assert 'another setting: TransformerConfig.window_len = 16, there 8' in caplog.text


def test_settings_of_training_and_speed_are_not_told(tiny_run, caplog):
  settings = ['layer_drop_rate = 0.0', 'block_len = 16']
  load(str(tiny_run), gin_bindings=[f'config.TransformerConfig.{s}' for s in settings])
  assert 'another setting' not in caplog.text


def _cut(path):
  path.write_bytes(path.read_bytes()[:10])


def _empty(path):
  path.write_text('{"model": {}}')


def _list(path):
  path.write_text('["model"]')


def _flip_bits(path):
  content = bytearray(path.read_bytes())
  for i in range(0, len(content), 64):  # In every array, also those of parameters.
    content[i] ^= 0x55
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('pattern', 'damage'),
  [
    ('state/manifest.ocdbt', _cut),
    ('state/_METADATA', _cut),
    ('metadata/metadata', _cut),
    ('metadata/metadata', _empty),
    ('metadata/metadata', _list),
    ('dataset/config.json', _cut),
    ('dataset/config.json', _list),
    ('state/d/*', _cut),
    ('state/ocdbt.process_0/d/*', _flip_bits),
  ],
)
def test_a_damaged_checkpoint_is_one_error_or_the_one_before_is_taken(
  copied, caplog, pattern, damage
):
  paths = list((copied / 'checkpoint_16').glob(pattern))
  assert paths
  for path in paths:
    damage(path)
  with pytest.raises(CheckpointError) as error:
    load(str(copied / 'checkpoint_16'))
  message = str(error.value)
  start = f'The checkpoint {copied / "checkpoint_16"} can not be read: '
  assert message.startswith(start)
  assert '\n' not in message
  assert load(str(copied)).step == 8
  # Arrays are read side by side: it may be another one that is found first.
  assert 'checkpoint_8 is taken instead' in caplog.text and start in caplog.text
