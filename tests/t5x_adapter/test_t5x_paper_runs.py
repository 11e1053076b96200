"""The paper's runs start in T5X, with small networks on small data in the real formats."""

import hashlib
import math

import pytest
from data_util import (
  enwik8_stand_in,
  imagenet64_as_tfds,
  pg19_as_published,
  random_images,
  sentencepiece_model,
)

pytest.importorskip('t5x.train', reason="T5X is not installed: the paper's runs in it")

import t5x_runs

from tvq_t5x.checkpoints import layout
from tvq_t5x.tasks import enwik8, imagenet64

# What would be --gin.NAME=VALUE on the command line.
NETWORK = [
  'TransformerConfig.emb_dim = 16',
  'TransformerConfig.key_dim = 8',
  'TransformerConfig.value_dim = 16',
  'TransformerConfig.num_layers = 1',
  'TransformerConfig.num_codes = 8',
]
SHORT = [
  "TASK_FEATURE_LENGTHS = {'targets': 64}",
  'UPDATE_LEN = 32',
  'TransformerConfig.block_len = 16',
  'TransformerConfig.window_len = 16',
]


def start(run, folder, steps, *settings, **macros):
  """Trains and saves; checks that the numbers are sound."""
  period = {'LOG_PERIOD': steps, 'EVAL_PERIOD': steps, 'CHECKPOINT_PERIOD': steps}
  macros = {'TRAIN_STEPS': steps, 'WARMUP_STEPS': 1, 'BATCH_SIZE': 2, **period, **macros}
  bindings = t5x_runs.bindings(MODEL_DIR=str(folder), **macros)
  files = [f'gin/{run}.gin']
  step, _ = t5x_runs.run('train', 'train', files, [*bindings, *NETWORK, *settings])
  assert step == steps
  assert layout.steps_in(folder) == [0, steps]
  losses = t5x_runs.scalars(folder / 'train')['cross_entropy']
  assert losses.keys() == {steps} and all(map(math.isfinite, losses.values()))


def assert_evaluated(folder, task, steps):
  found = t5x_runs.scalars(folder / 'training_eval' / task)['bits_per_byte']
  assert found.keys() == {steps} and math.isfinite(found[steps])


def test_enwik8(tmp_path):
  path = tmp_path / 'enwik8'
  sha1 = hashlib.sha1(enwik8_stand_in(path)).hexdigest()
  # Its validation split would take long.
  settings = [*SHORT, 'EVAL_PERIOD = None', f'enwik8.corpus.sha1 = {sha1!r}']
  try:
    start('enwik8_base', tmp_path / 'run', 4, *settings, ENWIK8_PATH=str(path))
  finally:
    enwik8._read.cache_clear()
    path.unlink()


def test_pg19(tmp_path):
  books = tmp_path / 'books'
  books.mkdir()
  pg19_as_published(books)
  macros = {
    'PG19_PATH': str(books),
    'SENTENCEPIECE_MODEL': sentencepiece_model(tmp_path),
    'TOKEN_CACHE_DIR': str(tmp_path / 'cache'),
    'VOCAB_SIZE': 300,
  }
  start('pg19_large', tmp_path / 'run', 4, *SHORT, **macros)
  assert_evaluated(tmp_path / 'run', 'pg19', 4)


def test_imagenet64(tmp_path, monkeypatch):
  splits = {'train': 'train[:3]', 'validation': 'train[3:]', 'test': 'validation'}
  monkeypatch.setattr(imagenet64, '_SPLITS', splits)
  images = {'train': random_images(0, 4), 'validation': random_images(1, 1)}
  imagenet64_as_tfds(tmp_path, images)
  macros = {'IMAGENET64_PATH': str(tmp_path), 'TOKEN_CACHE_DIR': str(tmp_path / 'cache')}
  # An image of 12,288 values gives 8 updates.
  start('imagenet64_large', tmp_path / 'run', 8, **macros)
  assert_evaluated(tmp_path / 'run', 'imagenet64', 8)
