"""t5x/infer.py in its three modes, with the codebooks in float32."""

import functools
import json
import os

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_task

pytest.importorskip('t5x.infer', reason='T5X is not installed: inference with it')

import t5x_runs
from t5x_runs import STEPS

from tvq_t5x.checkpoints import layout
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

LENGTH = 64
PROMPTS = ['', 'the sea ', 'and a ship', 'x' * LENGTH]
GREEDY = 'models.TransformerVQModel.predict_batch_with_aux.temperature = 0.0'

LONG = ['x' * 130, 'short']

for _name, _texts in (('prompts', PROMPTS), ('long_texts', LONG)):
  seqio.TaskRegistry.add(
    _name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None, texts=_texts: tf.data.Dataset.from_tensor_slices(
        {'targets': texts}
      ),
      splits=['test'],
    ),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
  )


@pytest.fixture(scope='module')
def infer(trained, tmp_path_factory):
  """Runs a mode; returns the records that it writes."""

  def run(mode, task, *settings):
    folder = tmp_path_factory.mktemp(mode)
    macros = {
      'CHECKPOINT_PATH': os.path.relpath(layout.folder(trained, STEPS)),
      'INFER_OUTPUT_DIR': str(folder),
      'MIXTURE_OR_TASK_NAME': task,
      'BATCH_SIZE': 3,
    }
    settings = [f'infer_script.infer.mode = {mode!r}', *settings]
    files = ['gin/runs/infer.gin', t5x_runs.TINY_MODEL, 'gin/mesh/data_parallel.gin']
    t5x_runs.run('infer', 'infer', files, [*t5x_runs.bindings(**macros), *settings])
    (path,) = folder.glob(f'{task}-{mode}.jsonl-00000-of-00001')
    return [json.loads(line) for line in path.read_text().splitlines()]

  return run


@functools.cache
def batch_of(task):
  """All sequences of a task's test split."""
  lengths = {'targets': LENGTH}
  dataset = seqio.get_mixture_or_task(task).get_dataset(lengths, 'test', shuffle=False)
  converted = TransformerVQFeatureConverter()(dataset, lengths)
  return next(converted.batch(1000).as_numpy_iterator())


def test_score(infer, trained):
  records = infer('score', 'tiny_bytes')
  loaded = t5x_runs.load(trained)
  scores, aux = jax.jit(loaded.model.score_batch)(loaded.params, batch_of('tiny_bytes'))
  assert len(records) == len(scores) == -(-(tiny_task.SIZES['test'] + 1) // LENGTH)
  # Codebooks in bfloat16 would make a difference in the third digit.
  np.testing.assert_allclose([r['score'] for r in records], scores, rtol=1e-5)
  for name, values in aux.items():
    assert [r['aux'][name] for r in records] == values.tolist()
  assert sum(r['aux']['num_bytes'] for r in records) == tiny_task.SIZES['test']


def test_score_of_long_texts(infer):
  """All of it, where SeqIO gives T5X the beginning only."""
  records = infer('score', 'long_texts')
  assert [r['aux']['num_bytes'] for r in records] == [64, 64, 2, 5]
  assert [r['inputs']['targets_pretokenized'] for r in records] == [*LONG[:1] * 3, LONG[1]]


def test_predict_with_aux(infer, trained):
  records = infer('predict_with_aux', 'prompts', GREEDY)
  model, params = (loaded := t5x_runs.load(trained)).model, loaded.params
  tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch_of('prompts'))
  decoded = [model.output_vocabulary.decode(row) for row in tokens.tolist()]
  assert [r['prediction'] for r in records] == decoded
  scores = [r['aux']['scores'] for r in records]
  np.testing.assert_allclose(scores, aux['scores'], rtol=1e-4, atol=1e-5)
  for record, prompt in zip(records, PROMPTS, strict=True):
    assert record['inputs']['targets_pretokenized'] == prompt
    assert record['prediction'].startswith(prompt)
  assert scores[-1] == 0.0  # Nothing was left to generate.


def test_several_continuations(infer):
  name = 'models.TransformerVQModel.predict_batch_with_aux'
  settings = [f'{name}.num_decodes = 2', f'{name}.return_all_decodes = True']
  for record, prompt in zip(infer('predict_with_aux', 'prompts', *settings), PROMPTS, strict=True):
    one, other = record['prediction']
    assert one.startswith(prompt) and other.startswith(prompt)
    assert (one == other) == (len(prompt) == LENGTH)
    assert record['aux']['scores'] == sorted(record['aux']['scores'])


def test_predict_draws_samples(infer):
  predictions = [r['prediction'] for r in infer('predict', 'prompts')]
  for prediction, prompt in zip(predictions, PROMPTS, strict=True):
    assert prediction.startswith(prompt)
  # Two rows without a prompt in common go different ways, and so does each at another try.
  greedy = [r['prediction'] for r in infer('predict', 'prompts', GREEDY)]
  assert all(a != b for a, b in zip(predictions[:3], greedy[:3], strict=True))
