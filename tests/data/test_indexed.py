"""Sequences by index: every token once, hosts in step, a position that is small and exact."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_task
from data_util import sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_t5x.common import errors
from tvq_t5x.data import indexed
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

LENGTH = 64
SEQUENCES = 11  # Of the validation split, the last of them short.


def dataset(split, batch_size, shards=1, index=0):
  """As T5X calls it, without end."""
  return seqio.get_dataset(
    'tiny_bytes',
    task_feature_lengths={'targets': LENGTH},
    feature_converter=TransformerVQFeatureConverter(pack=False),
    dataset_split=split,
    shuffle=True,
    num_epochs=None,
    seed=0,
    shard_info=seqio.ShardInfo(index, shards),
    verbose=False,
    batch_size=batch_size,
  )


def take(batches, count):
  return [batch['decoder_target_tokens'] for batch in itertools.islice(batches, count)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=9), max_size=6), st.data())
def test_byte_tokens_are_the_texts_with_eos_after_each(texts, data):
  tokens = indexed.ByteTokens([np.frombuffer(t, np.uint8) if len(t) % 2 else t for t in texts])
  expected = [token for text in texts for token in [*(byte + 3 for byte in text), 1]]
  assert len(tokens) == len(expected)
  start, stop = (data.draw(st.integers(0, len(expected) + 3)) for _ in range(2))
  found = tokens[start:stop]
  assert found.dtype == np.int32
  assert found.tolist() == expected[start:stop]


@pytest.mark.parametrize('length', [1, 7, 64, 701, 702, 5000])
def test_every_token_once(length):
  found = sequences('tiny_bytes', length, 'validation')
  assert all(len(tokens) == length for tokens in found[:-1])
  text = tiny_task.text('validation')
  assert np.concatenate(found).tolist() == [*(byte + 3 for byte in text), 1]


def test_counts():
  task = seqio.get_mixture_or_task('tiny_bytes')
  assert indexed.counts(task, 'test') == indexed.Counts(1, 501, 500, None)
  plain = seqio.Task('plain', source=task.source, output_features=task.output_features)
  assert indexed.counts(plain, 'test') is None


@pytest.mark.parametrize('shards', [2, 3])
def test_hosts_read_together_what_one_host_reads(shards):
  # Batches cross the ends of epochs of 11 sequences, at other places on each host.
  steps = 6
  whole = take(dataset('validation', 6).as_numpy_iterator(), steps)
  hosts = [
    take(dataset('validation', 6 // shards, shards, i).as_numpy_iterator(), steps)
    for i in range(shards)
  ]
  for step in range(steps):
    rows = np.stack([host[step] for host in hosts], axis=1).reshape(6, LENGTH)
    np.testing.assert_array_equal(rows, whole[step])


@pytest.mark.parametrize('shards', [3, 13])
def test_hosts_share_out_an_epoch(shards):
  found = [
    tokens.tobytes()
    for i in range(shards)
    for tokens in sequences(
      'tiny_bytes',
      LENGTH,
      'validation',
      shuffle=True,
      seed=0,
      shard_info=seqio.ShardInfo(i, shards),
    )
  ]
  assert len(set(found)) == len(found) == SEQUENCES


@pytest.mark.parametrize('steps', [0, 1, 20])
def test_a_position_is_small_and_exact(tmp_path, steps):
  def batches():
    return iter(dataset('train', 30, shards=2, index=1).prefetch(8))

  reader = batches()
  take(reader, steps)
  path = tf.train.Checkpoint(iterator=reader).write(str(tmp_path / 'position'))
  assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4_000
  expected = take(reader, 20)

  restored = batches()
  take(restored, 2)
  tf.train.Checkpoint(iterator=restored).read(path).assert_consumed()
  np.testing.assert_array_equal(take(restored, 20), expected)


def test_a_mixture_continues_from_a_position(tmp_path):
  parts = [
    indexed.byte_level_task(f'part_{i}', lambda split, i=i: [bytes([65 + i]) * 90], ['train'])
    for i in range(2)
  ]
  mixture = seqio.Mixture('parts', [(task, 1.0) for task in parts])

  def examples():
    return iter(mixture.get_dataset({'targets': 8}, split='train', seed=0))

  try:
    reader = examples()
    next(reader), next(reader), next(reader)
    path = tf.train.Checkpoint(iterator=reader).write(str(tmp_path / 'position'))
    expected = [next(reader)['targets'].numpy().tolist() for _ in range(40)]
    assert {tokens[0] for tokens in expected} == {68, 69}
    restored = examples()
    tf.train.Checkpoint(iterator=restored).read(path).assert_consumed()
    assert [next(restored)['targets'].numpy().tolist() for _ in range(40)] == expected
  finally:
    for task in parts:
      seqio.TaskRegistry.remove(task.name)


def test_an_empty_split_is_refused_rather_than_waited_for():
  task = indexed.byte_level_task('empty', lambda split: [], ['train'])
  try:
    with pytest.raises(errors.ConfigError, match="'train' of empty is empty"):
      sequences(task, 8, 'train', num_epochs=None)
  finally:
    seqio.TaskRegistry.remove('empty')


def _metrics(task, length, num_examples=None, split='test'):
  """SeqIO's, of a model that needs a nat for each token, each of two bytes."""
  evaluator = seqio.Evaluator(
    task.name,
    TransformerVQFeatureConverter(pack=False),
    eval_split=split,
    sequence_length={'targets': length},
    num_examples=num_examples,
  )

  def score(examples, model_feature_shapes=None):
    del model_feature_shapes
    sizes = [(int(i), float(batch['decoder_loss_weights'].numpy().sum())) for i, batch in examples]
    counts = [size for _, size in sizes]
    aux = {'num_tokens': counts, 'num_bytes': [2 * count for count in counts]}
    return [(i, -size) for i, size in sizes], aux

  metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score)
  return metrics.result()[task.name]


def test_seqio_metrics(text_task):
  metrics = _metrics(text_task, 8)
  tokens, words = 43, 8
  assert metrics['cross_entropy'] == 1
  np.testing.assert_allclose(metrics['bits_per_byte'], 0.5 / np.log(2))
  np.testing.assert_allclose(metrics['word_perplexity'], np.exp(tokens / words))
  # Words are not known of a part.
  assert metrics.keys() - _metrics(text_task, 8, num_examples=3).keys() == {'word_perplexity'}


def test_the_words_are_those_of_the_split(text_task):
  """Also where another split, read before and after, has as many tokens."""
  found = [
    _metrics(text_task, 8, split=split)['word_perplexity'] for split in ('test', 'same_size')
  ]
  np.testing.assert_allclose(found, np.exp([43 / 8, 43 / 2]))
  np.testing.assert_allclose(_metrics(text_task, 8)['word_perplexity'], np.exp(43 / 8))


def test_metrics_of_ones_own_stay(text_task):
  own = text_task.replace(metric_fns=[lambda targets, scores: {'own': 1.0}], metric_objs=[])
  task = indexed.InMemoryTask(
    'own_metrics',
    source=own.source,
    output_features=own.output_features,
    preprocessors=own.preprocessors,
    metric_fns=own.metric_fns,
  )
  seqio.TaskRegistry.add_provider(task.name, task)
  try:
    assert _metrics(task, 8) == {'own': 1.0}
  finally:
    seqio.TaskRegistry.remove(task.name)


@pytest.fixture
def text_task():
  texts = {
    'test': [b'in the beginning was', b'  the word\n\nthe word '],
    'same_size': [b'x' * 21, b'y' * 20],
  }
  task = seqio.TaskRegistry.add(
    'text_in_memory',
    source=indexed.text_source(texts.__getitem__, list(texts)),
    preprocessors=indexed.text_preprocessors(),
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    task_cls=indexed.InMemoryTask,
  )
  yield task
  seqio.TaskRegistry.remove(task.name)


def test_in_memory(text_task):
  tokens, counts = text_task.read('test')
  expected = [*(b + 3 for b in b'in the beginning was'), 1]
  expected += [*(b + 3 for b in b'  the word\n\nthe word '), 1]
  assert tokens.tolist() == expected
  assert counts == indexed.Counts(2, len(expected), len(expected) - 2, 8)
  assert np.concatenate(sequences(text_task, 7, 'test')).tolist() == expected
  assert [len(document) for document in sequences(text_task, None, 'test')] == [21, 22]


_TASKS = """
from tvq_t5x.data import indexed

indexed.byte_level_task('of_a_reloaded_module', lambda split: [TEXT], ['train'])
"""


def test_a_module_of_tasks_can_be_reloaded(tmp_path, monkeypatch):
  path = tmp_path / 'reloaded_module_of_tasks.py'
  path.write_text(f"TEXT = b'first'\n{_TASKS}")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  module = importlib.import_module(path.stem)
  try:
    path.write_text(f"TEXT = b'second'\n{_TASKS}")
    importlib.reload(module)
    found = np.concatenate(sequences('of_a_reloaded_module', 9, 'train'))
    assert bytes(found[:-1].astype(np.uint8) - 3) == b'second'
    # Any other task of this name is a mistake.
    with pytest.raises(ValueError, match='duplicate'):
      indexed.byte_level_task('of_a_reloaded_module', lambda split: [b''], ['train'])
    exec_twice = f'{path.read_text()}\n{_TASKS}'
    path.write_text(exec_twice)
    with pytest.raises(ValueError, match='duplicate'):
      importlib.reload(module)
  finally:
    seqio.TaskRegistry.remove('of_a_reloaded_module')


@pytest.mark.parametrize(
  'name', ['kjv', 'kjv_sentencepiece', 'enwik8', 'pg19', 'imagenet64', 'photos64']
)
def test_our_own_modules_of_tasks_can_be_reloaded(name):
  importlib.reload(importlib.import_module(f'tvq_t5x.tasks.{name}'))


def test_every_seed_has_an_order_of_its_own():
  seeds = [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
  orders = {
    seed: tuple(
      tokens.tobytes()
      for tokens in sequences('tiny_bytes', 8, 'validation', shuffle=True, seed=seed)
    )
    for seed in seeds
  }
  assert len(set(orders.values())) == len(seeds)
