"""T5X's InteractiveModel, from a checkpoint of a run: it scores, continues and trains."""

import os

import jax
import numpy as np
import pytest
import seqio

pytest.importorskip('t5x.interactive_model', reason='T5X is not installed: its InteractiveModel')

import t5x_runs
from mesh_util import by_name
from t5x.interactive_model import InferenceType
from t5x_runs import STEPS

from tvq_t5x.checkpoints import layout
from tvq_t5x.t5x_adapter.interactive import InteractiveModel

LENGTH = 64
TEXTS = ['the sea and a ship', 'sky.\n', 'a']
TOKENIZE = [seqio.preprocessors.tokenize]


@pytest.fixture(scope='module')
def loaded(trained):
  return t5x_runs.load(trained)


def make(loaded, trained, folder):
  return InteractiveModel(
    batch_size=2,
    task_feature_lengths={'targets': LENGTH},
    output_dir=str(folder),
    partitioner=t5x_runs.partitioner((1, 1)),
    model=loaded.model,
    restore_mode='specific',
    checkpoint_path=os.path.relpath(layout.folder(trained, STEPS)),
    input_shapes={'decoder_input_tokens': (2, LENGTH)},
    input_types={'decoder_input_tokens': np.int32},
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('interactive')


@pytest.fixture(scope='module')
def interactive(loaded, trained, folder):
  rng_kind = jax.config.jax_default_prng_impl
  yield make(loaded, trained, folder)
  # T5X changes it for the whole process.
  jax.config.update('jax_default_prng_impl', rng_kind)


def examples(texts):
  return [{'input': '', 'target': text} for text in texts]


def batch_of(model, texts, eos):
  tokens = np.zeros([len(texts), LENGTH], np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = model.output_vocabulary.encode(text) + [1] * eos
    row[: len(ids)] = ids
  return {
    'decoder_target_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens, [(0, 0), (1, 0)], constant_values=1)[:, :-1],
    'decoder_loss_weights': (tokens > 0).astype(np.float32),
  }


def test_it_starts_from_the_checkpoint(interactive, trained):
  assert interactive.step == STEPS
  saved = t5x_runs.arrays(trained, STEPS)
  for name, x in by_name(interactive.train_state.state_dict()).items():
    np.testing.assert_array_equal(x, saved[name], err_msg=name)


def test_score(interactive, loaded):
  scores = [score for _, score in interactive.score(examples(TEXTS))]
  batch = batch_of(loaded.model, TEXTS, eos=True)
  expected, _ = jax.jit(loaded.model.score_batch)(loaded.params, batch)
  np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_predict_with_aux(interactive, loaded):
  """Prompts without the EOS that T5X's `predict_with_aux` puts behind them."""
  inferences, aux = interactive.infer_with_preprocessors(
    InferenceType.PREDICT_WITH_AUX, examples(TEXTS), TOKENIZE, temperature=0.0
  )
  batch = batch_of(loaded.model, TEXTS, eos=False)
  tokens, expected = jax.jit(loaded.model.predict_batch_with_aux)(loaded.params, batch)
  decoded = [loaded.model.output_vocabulary.decode(row) for row in tokens.tolist()]
  assert [text.decode() for _, text in inferences] == decoded
  np.testing.assert_allclose(aux['scores'], expected['scores'], rtol=1e-4)


def test_train_step(interactive, loaded, trained, folder):
  before, _ = jax.jit(loaded.model.score_batch)(loaded.params, batch_of(loaded.model, TEXTS, True))
  for _ in range(3):
    interactive.train_step(examples(TEXTS[:2]))
  assert interactive.step == STEPS + 3
  after = [score for _, score in interactive.score(examples(TEXTS))]
  assert after[0] > before[0]
  state = by_name(interactive.train_state.params)
  old = by_name(loaded.params)
  name = 'layers/attention_0/quantizer/c_sum'
  assert np.max(np.abs(state[name] - old[name])) > 0
  # It has saved a checkpoint of its own there.
  assert make(loaded, trained, folder).step == STEPS
