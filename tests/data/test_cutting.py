"""Tasks of a user's own, whose examples are longer than a sequence: every token is read."""

import collections
import functools
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_task
from data_util import sequences

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, streaming
from tvq_t5x.data.cutting import cut
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

LENGTH = 64
TEXTS = [
  bytes(np.random.default_rng(i).integers(97, 123, n, np.uint8))
  for i, n in enumerate((1000, 1500, 2000, 5, 63, 64))
]
TARGETS = 'decoder_target_tokens'


def plain(name, texts, append=seqio.preprocessors.append_eos, **kwargs):
  """A task as a user writes it, of SeqIO's own kind."""
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({'targets': texts}),
    splits=['train', 'test'],
  )
  return seqio.Task(
    name,
    source=source,
    preprocessors=[seqio.preprocessors.tokenize, append],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    **kwargs,
  )


def expected(texts=TEXTS):
  """Sequences in order, each with its padding."""
  found = []
  for text in texts:
    tokens = [*(byte + 3 for byte in text), 1]
    found += [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]
  return [(*part, *[0] * (LENGTH - len(part))) for part in found]


def config(task, **changes):
  return datasets.DatasetConfig(
    **{
      'mixture_or_task_name': task,
      'task_feature_lengths': {'targets': LENGTH},
      'split': 'test',
      'batch_size': 4,
      'shuffle': False,
      'seed': 0,
      **changes,
    }
  )


def rows(batches, count=None):
  found = itertools.islice(batches, count)
  return [tuple(row) for batch in found for row in batch[TARGETS].tolist() if any(row)]


def evaluated(task):
  return rows(datasets.evaluation_batches(config(task), TransformerVQFeatureConverter))


def trained(task, count, **changes):
  cfg = config(task, **changes)
  batches = datasets.training_batches(cfg, TransformerVQFeatureConverter)
  return rows(batches, -(-count // 4))[:count]


APPENDING = {
  'append_eos': seqio.preprocessors.append_eos,
  'after_trim': seqio.preprocessors.append_eos_after_trim,
  'partial': functools.partial(seqio.preprocessors.append_eos_after_trim),
}


@pytest.mark.parametrize('append', APPENDING.values(), ids=APPENDING)
def test_every_token_is_read(append):
  task = plain('plain', TEXTS, append)
  assert evaluated(task) == expected()
  assert trained(task, 2 * len(expected())) == 2 * expected()
  # The task itself is left as it was.
  assert [len(tokens) for tokens in sequences(task, LENGTH, 'test')] == [64, 64, 64, 6, 64, 64]


def test_shuffled_training_reads_every_token():
  task = plain('plain', TEXTS)
  found = trained(task, 9 * len(expected()), shuffle=True)
  counts = collections.Counter(found)
  assert counts.keys() == set(expected())
  assert found[: len(expected())] != expected()
  # The pieces of a text do not follow each other.
  places = {row: i for i, row in enumerate(expected())}
  assert sum(places[b] == places[a] + 1 for a, b in itertools.pairwise(found)) < len(found) / 10


def test_hosts_share_the_sequences():
  cfg = config(plain('plain', TEXTS))
  parts = [
    datasets.training_dataset(cfg, TransformerVQFeatureConverter, host, 2).as_numpy_iterator()
    for host in range(2)
  ]
  found = [row for part in parts for row in rows(part, 2 * len(expected()))]
  assert set(found) == set(expected())


def test_a_position_is_restored(tmp_path):
  cfg = config(plain('plain', TEXTS), shuffle=True)
  batches = datasets.training_batches(cfg, TransformerVQFeatureConverter)
  rows(batches, 30)
  batches.save(tmp_path)
  again = datasets.training_batches(cfg, TransformerVQFeatureConverter)
  again.restore(tmp_path)
  assert rows(again, 20) == rows(batches, 20)


def mixture(*tasks):
  return seqio.Mixture('both', [(task, 1.0) for task in tasks])


def test_mixtures_of_plain_and_indexed_tasks():
  indexed = seqio.get_mixture_or_task('tiny_bytes')
  both = mixture(plain('plain', TEXTS), indexed)
  ours = expected([tiny_task.text('test')])
  # Task after task: SeqIO's own mixing ends with the shortest.
  assert evaluated(both) == expected() + ours
  found = trained(both, 6 * len(expected()))
  assert set(found) == set(expected()) | set(ours)
  # The rates are those of sequences.
  assert sum(row in set(ours) for row in found) == pytest.approx(len(found) / 2, rel=0.15)


def test_mixtures_keep_their_rates():
  tasks = [plain(name, [name.encode() * 99]) for name in 'ab']
  inner = seqio.Mixture('inner', [(tasks[0], lambda task: {'a': 3.0}[task.name])])
  outer = seqio.Mixture('outer', [(inner, 3.0), (tasks[1], 1.0)])
  assert [outer.get_rate(task) for task in outer.tasks] == [3, 1]
  found = cut(outer)
  assert [found.get_rate(task) for task in found.tasks] == [3, 1]
  assert [task.name for task in found.tasks] == ['a', 'b']


def test_tasks_of_sequences_are_left_alone():
  indexed = seqio.get_mixture_or_task('tiny_bytes')
  assert cut(indexed) is indexed
  whole = mixture(indexed)
  assert cut(whole) is whole


def test_different_vocabularies_are_refused():
  other = plain('other', TEXTS)
  other.output_features['targets'] = seqio.Feature(seqio.ByteVocabulary(9))
  with pytest.raises(ConfigError, match='both.*different vocabularies'):
    datasets.vocabulary(mixture(plain('plain', TEXTS), other))


def test_their_text_is_not_carried_on():
  with pytest.raises(ConfigError, match='plain are not parts of one text'):
    streaming.training_batches(config(plain('plain', TEXTS)), TransformerVQFeatureConverter)


@pytest.mark.parametrize('seed', [-1, 2**31 - 1, 2**40])
def test_seeds_that_seqio_would_take_for_others_are_refused(seed):
  with pytest.raises(ConfigError, match=rf'DatasetConfig\.seed = {seed} .*0 to 2147483646'):
    trained(plain('plain', TEXTS), 1, seed=seed)


def test_loss_weights_are_cut_with_their_targets():
  targets = np.arange(3, 3 + 150, dtype=np.int32)
  task = seqio.Task(
    'weighted',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
        {'targets': targets, 'loss_weights': targets / 2}
      ),
      splits=['test'],
    ),
    preprocessors=[],
    output_features={'targets': seqio.Feature(seqio.PassThroughVocabulary(160), add_eos=False)},
  )
  (batch,) = datasets.evaluation_batches(config(task), TransformerVQFeatureConverter)
  np.testing.assert_array_equal(batch['decoder_loss_weights'], batch[TARGETS] / 2)
  assert np.count_nonzero(batch[TARGETS]) == len(targets)
