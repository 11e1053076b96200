"""t5x/export.py: SavedModels that score and continue texts of any number and length."""

import gc
import os

import jax
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip('t5x.export_lib', reason='T5X is not installed: its export')

import t5x_runs
from t5x_runs import STEPS

from tvq_t5x.checkpoints import layout

LENGTH = 64
TEXTS = ['the sea and a ship', '', 'sky.\n', 'x' * (LENGTH + 5)]


@pytest.fixture(scope='module')
def loaded(trained):
  return t5x_runs.load(trained)


@pytest.fixture
def export(trained, tmp_path):
  """Exports a checkpoint with a gin file; returns what the SavedModel serves."""

  def run(file, *settings, **macros):
    macros = {
      'CHECKPOINT_PATH': os.path.relpath(layout.folder(trained, STEPS)),
      'MODEL_OUTPUT_DIR': {'cpu': str(tmp_path / '1')},
      'MODEL_NAME': 'tiny',
      **macros,
    }
    files = [f'gin/runs/{file}', t5x_runs.TINY_MODEL]
    # Writers of other tests' metrics that are dropped meanwhile would become part of it.
    gc.collect()
    t5x_runs.run('export_lib', 'save', files, [*t5x_runs.bindings(**macros), *settings])
    module = tf.saved_model.load(str(tmp_path / '1'))
    served = module.signatures['serving_default']
    return lambda batch: {k: x.numpy() for k, x in served(text_batch=tf.constant(batch)).items()}

  return run


def tokens_of(model, texts):
  tokens = np.zeros([len(texts), LENGTH], np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = model.output_vocabulary.encode(text)[:LENGTH]
    row[: len(ids)] = ids
  return tokens


def batch_of(tokens):
  return {
    'decoder_target_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens, [(0, 0), (1, 0)], constant_values=1)[:, :-1],
    'decoder_loss_weights': (tokens > 0).astype(np.float32),
  }


def test_score(export, loaded):
  score = export('export_score.gin')
  scores, aux = loaded.model.score_batch(loaded.params, batch_of(tokens_of(loaded.model, TEXTS)))
  for texts in (TEXTS, TEXTS[:1]):
    found = score(texts)
    np.testing.assert_allclose(found['score'], scores[: len(texts)], rtol=1e-5)
    for name in ('num_tokens', 'num_bytes'):
      np.testing.assert_array_equal(found[name], aux[name][: len(texts)])


def test_predict(export, loaded):
  found = export('export.gin')(TEXTS)
  batch = batch_of(tokens_of(loaded.model, TEXTS))
  tokens, aux = jax.jit(loaded.model.predict_batch_with_aux)(loaded.params, batch)
  expected = [loaded.model.output_vocabulary.decode(row) for row in tokens.tolist()]
  assert [text.decode(errors='replace') for text in found['text']] == expected
  np.testing.assert_allclose(found['score'], aux['scores'], rtol=1e-4, atol=1e-5)


def test_tokens_in_place_of_texts(export, loaded):
  settings = ['export_lib.save.tokenized_inputs = True']
  tokens = tokens_of(loaded.model, TEXTS[:2])
  found = export('export_score.gin', *settings, BATCH_SIZE=2)(tokens)
  scores, _ = loaded.model.score_batch(loaded.params, batch_of(tokens))
  np.testing.assert_allclose(found['score'], scores, rtol=1e-5)
