"""A classifier in a run: it trains, goes on after an interruption, and is evaluated."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_classes
from util import one_device

from tvq_t5x import evaluate, sample, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.commands.sampling_options import Options
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.generation import language_model

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / 'tests' / 'tiny_classifier.gin')
SETTINGS = {'TRAIN_STEPS': 8, 'CHECKPOINT_PERIOD': 4, 'EVAL_PERIOD': 8}
LENGTH = 22
pytestmark = pytest.mark.usefixtures('cleared_gin')


def run(folder, expected=0, dry_run=False, **settings):
  settings = {
    **SETTINGS,
    'MODEL_DIR': str(folder),
    'optimizers.warmup_cosine.total_steps': 8,
    **settings,
  }
  with one_device():
    bindings = [f'{name} = {value!r}' for name, value in settings.items()]
    assert train.run([TINY], bindings, dry_run=dry_run) == expected


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('classifier') / 'run'
  run(folder)
  return folder


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers(whole, tmp_path):
  for steps in (4, 8):
    run(tmp_path / 'run', TRAIN_STEPS=steps)
  found = [layout.read_metadata(layout.folder(f, 8)) for f in (whole, tmp_path / 'run')]
  assert found[0]['checksums'] == found[1]['checksums']
  assert found[0]['model']['bidirectional']
  assert found[0]['data']['vocabulary'] == 'bytes, 3 classes'
  assert found[0]['training']['adamw.clip_norm'] == 1.0


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(whole, tmp_path):
  folder = tmp_path / 'run'
  settings = {**SETTINGS, 'MODEL_DIR': str(folder), 'CHECKPOINT_PERIOD': 1}
  flags = [f'--gin.{name}={value!r}' for name, value in settings.items()]
  command = [sys.executable, '-m', 'tvq_t5x.train', f'--gin_file={TINY}', *flags]
  one = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  env = {**os.environ, 'XLA_FLAGS': one, 'PYTHONPATH': str(ROOT / 'tests')}
  with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
    while not folder.exists() or (layout.steps_in(folder) or [0])[-1] < 2:
      assert process.poll() is None
      time.sleep(0.01)
    process.kill()
  assert 2 <= layout.steps_in(folder)[-1] < 8
  run(folder)
  found = [layout.read_metadata(layout.folder(f, 8)) for f in (whole, folder)]
  assert found[0]['checksums'] == found[1]['checksums']


@pytest.mark.parametrize('batch_size', [5, pytest.param(32, marks=pytest.mark.slow)])
def test_it_is_evaluated_by_its_own_configuration(whole, tmp_path, capsys, batch_size):
  """Each example counts once, in batches of any size."""
  file = tmp_path / 'predictions.jsonl'
  with one_device():
    args = {'checkpoint': str(whole), 'split': 'test', 'modules': ['tiny_classes']}
    args['predictions_file'] = str(file)
    assert evaluate.run([], [f'BATCH_SIZE = {batch_size}'], json_file='-', **args) == 0
  found = json.loads(capsys.readouterr().out)
  records = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  expected = next(r for r in records if r['split'] == 'test')
  for name in ('accuracy', 'cross_entropy', 'commit_loss'):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
  texts = [example.inputs for example in tiny_classes.examples('test')]
  assert found['examples'] == len(texts)
  assert found['examples_cut'] == sum(len(text) > LENGTH for text in texts) > 0
  assert not {'tokens', 'perplexity', 'bits_per_byte'} & found.keys()
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  labels = [line['label'] for line in lines]
  assert labels == [example.label for example in tiny_classes.examples('test')]
  hits = [line['class'] == line['label'] for line in lines]
  np.testing.assert_allclose(np.mean(hits), found['accuracy'], rtol=1e-6)
  assert all(line['class'] == np.argmax(line['log_probabilities']) for line in lines)
  nats = [-line['log_probabilities'][line['label']] for line in lines]
  np.testing.assert_allclose(np.mean(nats), found['cross_entropy'], rtol=1e-5)


def test_a_dry_run_says_what_is_cut(tmp_path, capsys):
  run(tmp_path / 'run', dry_run=True)
  out = capsys.readouterr().out
  for split in tiny_classes.SIZES:
    number = sum(len(example.inputs) > LENGTH for example in tiny_classes.examples(split))
    assert f'tiny_classes, {split}: {number} examples are cut to 22' in out


def test_it_writes_nothing(whole, capsys):
  with one_device():
    assert sample.run([], [], [], str(whole), Options(), ['tiny_classes']) == 2
    assert 'ClassifierModel, an encoder' in capsys.readouterr().err
    with pytest.raises(ConfigError, match='neither writes nor scores'):
      language_model.load(str(whole), modules=['tiny_classes'])
    args = {'checkpoint': str(whole), 'modules': ['tiny_classes']}
    assert evaluate.run([], carry_state=True, **args) == 2
  assert '--carry_state: the sequences of tiny_classes' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'UPDATE_LEN': 11}, 'update_len = 11 (macro UPDATE_LEN) is not accepted: give None'),
    ({'CARRY_STATE': True}, 'give False: an encoder has no state'),
    ({'TASK_FEATURE_LENGTHS': {'targets': 22}}, "such as {'inputs': 512}"),
    (
      {'MIXTURE_OR_TASK_NAME': 'tiny_bytes', 'MIXTURE_OR_TASK_MODULE': 'tiny_task'},
      'inputs and label',
    ),
    ({'config.TransformerConfig.window_len': 9}, 'at most TransformerConfig.block_len = 8'),
  ],
)
def test_refusals(tmp_path, capsys, settings, message):
  run(tmp_path / 'run', expected=2, **settings)
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
