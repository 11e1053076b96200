"""Associative recall: what is asked for was said before, and only that has a loss weight."""

import gin
import jax
import numpy as np
import pytest
import seqio
from util import computed, random_params, small_model

from tvq_t5x.common import errors
from tvq_t5x.data import datasets
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import recall

SMALL = {'vocab_size': 64, 'num_train': 21, 'num_eval': 5}
SETTINGS = recall.data(**SMALL)
TARGETS, WEIGHTS = 'decoder_target_tokens', 'decoder_loss_weights'


@pytest.fixture(autouse=True)
def _settings():
  gin.clear_config()
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/recall.gin')
  for name, value in SMALL.items():
    gin.bind_parameter(f'tvq_t5x.tasks.recall.data.{name}', value)
  yield
  gin.clear_config()


def config(task='recall_128_8', length=128, **changes):
  return datasets.DatasetConfig(
    **{
      'mixture_or_task_name': task,
      'task_feature_lengths': {'targets': length},
      'split': 'train',
      'batch_size': 4,
      'shuffle': True,
      'seed': 0,
      **changes,
    }
  )


@pytest.mark.parametrize(('length', 'pairs'), [(128, 4), (128, 32), (2048, 64)])
def test_every_value_that_is_asked_for_was_given(length, pairs):
  settings = recall.data(vocab_size=8192)
  for number in range(20):
    tokens, weights = recall.sequence(settings, length, pairs, 'train', number)
    assert tokens.min() >= 3 and tokens.max() < 8192
    keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert keys.max() < values.min()
    given = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert len(given) == len(set(given.values())) == pairs
    (places,) = np.nonzero(weights)
    assert set(weights) == {0, 1} and places.min() > 2 * pairs
    asked = dict(zip(tokens[places - 1].tolist(), tokens[places].tolist(), strict=True))
    assert asked == given  # Each key once.


def test_gaps_follow_the_power_law():
  """The first query is that of the sequence's first key, as in Zoology's code."""
  found = []
  for number in range(2000):
    tokens, weights = recall.sequence(SETTINGS, 128, 4, 'train', number)
    places = np.nonzero(weights)[0]
    found += [(p - 9) // 2 for p in places if tokens[p - 1] == tokens[0]]
  law = 1 / np.arange(1, 61) ** 0.99
  expected = law / law.sum()
  # Of the first key, whose gap was drawn when no other was taken; 4.5 standard deviations.
  shares = np.bincount(found, minlength=60) / 2000
  assert np.all(np.abs(shares - expected) < 4.5 * np.sqrt(expected / 2000))


def test_batches():
  batches = datasets.evaluation_batches(
    config(split='test', shuffle=False), TransformerVQFeatureConverter
  )
  rows = [row for batch in batches for row in zip(batch[TARGETS], batch[WEIGHTS], strict=True)]
  assert len(rows) == 8  # Two batches; the last three rows are empty.
  for number, (tokens, weights) in enumerate(rows):
    expected = recall.sequence(SETTINGS, 128, 8, 'test', number) if number < 5 else (0, 0)
    np.testing.assert_array_equal(tokens, np.broadcast_to(expected[0], 128))
    np.testing.assert_array_equal(weights, np.broadcast_to(expected[1], 128))


def test_training_batches_can_be_resumed(tmp_path):
  def start():
    return datasets.training_batches(config(), TransformerVQFeatureConverter)

  batches = start()
  first = [next(batches) for _ in range(5)]  # An epoch is 21 sequences.
  assert len({row.tobytes() for batch in first for row in batch[TARGETS]}) == 20
  assert all(batch[WEIGHTS].sum() == 4 * 8 for batch in first)
  batches.save(tmp_path)
  expected = next(batches)
  again = start()
  again.restore(tmp_path)
  for name, value in next(again).items():
    np.testing.assert_array_equal(value, expected[name])


def test_splits_and_seeds_differ():
  other = recall.data(**SMALL, seed=-1)
  args = [(SETTINGS, split) for split in ('train', 'validation', 'test')] + [(other, 'train')]
  found = {recall.sequence(s, 128, 4, split, 0)[0].tobytes() for s, split in args}
  assert len(found) == 4


def test_only_queries_count_but_all_keys_of_the_network_are_learned():
  model = small_model(vocab_size=64)
  params = random_params(model.config)
  batch = next(datasets.training_batches(config(), TransformerVQFeatureConverter))
  evaluate = jax.jit(model.eval_fn)
  loss, metrics = evaluate(params, batch)
  other = {**batch, WEIGHTS: np.ones_like(batch[WEIGHTS])}
  _, of_all = evaluate(params, other)
  logits, _, _ = jax.jit(model.module.apply)({'params': params}, batch['decoder_input_tokens'])
  hits = (np.argmax(logits, -1) == batch[TARGETS])[batch[WEIGHTS] == 1]
  found, expected = computed(metrics), computed(of_all)
  assert found['accuracy'] == pytest.approx(hits.mean())
  assert float(metrics['cross_entropy'].count) == 4 * 8
  assert found['cross_entropy'] != pytest.approx(expected['cross_entropy'], rel=1e-3)
  for name in ('commit_loss', 'codebook_perplexity/layer_0_0'):
    assert found[name] == pytest.approx(expected[name])


def test_the_size_of_the_vocabulary():
  assert datasets.vocab_size('recall_128_8') == 64
  gin.bind_parameter('tvq_t5x.tasks.recall.data.vocab_size', 100)
  assert datasets.vocab_size('recall_128_8') == 104


@pytest.mark.parametrize(
  ('task', 'length', 'changes', 'words'),
  [
    ('recall_128_8', 256, {}, r"give \{'targets': 128\}"),
    ('recall_128_32', 128, {}, 'vocab_size = 64 .* at least 67'),
    ('recall_128_8', 128, {'num_train': 0}, 'num_train = 0 .* at least 1'),
    ('recall_128_8', 128, {'vocab_size': 4}, 'vocab_size = 4 .* at least 5'),
    ('recall_128_8', 128, {'power': 0}, 'power = 0 .* above 0'),
    ('recall_128_8', 128, {'seed': None}, 'seed = None .* whole number'),
  ],
)
def test_refusals(task, length, changes, words):
  for name, value in changes.items():
    gin.bind_parameter(f'tvq_t5x.tasks.recall.data.{name}', value)
  with pytest.raises(errors.ConfigError, match=words):
    datasets.check(config(task, length), TransformerVQFeatureConverter)


@pytest.mark.parametrize('length', [None, 128])
def test_seqio_reads_whole_sequences(length):
  lengths = {'targets': length} if length else None
  dataset = seqio.get_mixture_or_task('recall_128_8').get_dataset(
    lengths, split='validation', shuffle=False
  )
  first, *rest = dataset.as_numpy_iterator()
  assert len(rest) == 4
  expected = recall.sequence(SETTINGS, 128, 8, 'validation', 0)
  np.testing.assert_array_equal(first['targets'], expected[0])
  np.testing.assert_array_equal(first['loss_weights'], expected[1])
