"""Classification tasks: what a batch holds, what is cut, what is refused."""

import functools

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, datasets
from tvq_t5x.data.classification import Example
from tvq_t5x.data.feature_converters import ClassificationFeatureConverter

TEXTS = ['sea', 'a ship at sea', '', 'sky', 'caf\u00e9', 'the sky and the sea']
LENGTH = 8


def texts(split):
  if split == 'wrong':
    return [Example('sea', 3)]
  return [Example(text, i % 3) for i, text in enumerate(TEXTS)]


def pairs(split):
  return [Example(a.encode(), 1, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]


def numbers(split):
  return [Example(np.linspace(-1, 1, n), 0) for n in (8, 8, 8)]


@pytest.fixture(scope='module', autouse=True)
def tasks():
  add = functools.partial(classification.register, module=__name__, num_classes=3)
  vocabulary = seqio.ByteVocabulary()
  splits = ['train', 'validation', 'wrong']
  add('tiny_texts', examples=texts, splits=splits, vocabulary=vocabulary)
  add('tiny_pairs', examples=pairs, splits=['train'], vocabulary=vocabulary, pair=True)
  add('tiny_numbers', examples=numbers, splits=['train'], sequence_len=8)
  yield
  for name in ('tiny_texts', 'tiny_pairs', 'tiny_numbers'):
    seqio.TaskRegistry.remove(name)


def config(name, **changes):
  fields = {'split': 'train', 'batch_size': 4, 'shuffle': False, 'seed': 0}
  lengths = {'inputs': LENGTH}
  return datasets.DatasetConfig(name, lengths, **{**fields, **changes})


def batches(name, **changes):
  cfg = config(name, **changes)
  found = classification.format_of(datasets.validate(cfg, ClassificationFeatureConverter))
  converter = functools.partial(
    ClassificationFeatureConverter, real_inputs=found.vocabulary is None, pair=found.pair
  )
  return list(datasets.evaluation_batches(cfg, converter))


def joined(found):
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def ids(text):
  return [byte + 3 for byte in text.encode()][:LENGTH]


def test_a_batch_holds_texts_that_lost_their_tail_or_are_padded():
  found = joined(batches('tiny_texts'))
  shown = found['label_weights'] > 0
  assert shown.sum() == len(TEXTS)
  assert found['label'][shown].tolist() == [0, 1, 2, 0, 1, 2]
  for row, size, text in zip(
    found['encoder_input_tokens'], found['encoder_lengths'], TEXTS, strict=False
  ):
    assert row.tolist() == ids(text) + [0] * (LENGTH - len(ids(text)))
    assert size == len(ids(text))


def test_two_texts():
  found = joined(batches('tiny_pairs'))
  assert found['encoder_input_tokens'].shape == found['encoder_input_tokens_2'].shape == (8, LENGTH)
  assert found['encoder_lengths_2'][:6].tolist() == [len(ids(text)) for text in TEXTS[::-1]]


def test_real_numbers():
  (found,) = batches('tiny_numbers')
  assert found['encoder_input_tokens'].dtype == np.float32
  np.testing.assert_allclose(found['encoder_input_tokens'][2], np.linspace(-1, 1, 8), rtol=1e-6)
  assert found['label_weights'].tolist() == [1, 1, 1, 0]


def test_how_many_are_cut():
  task = seqio.get_mixture_or_task('tiny_texts')
  for length in (2, 5, 8, 100):
    expected = sum(len(text.encode()) > length for text in TEXTS)
    assert classification.num_cut(task, 'train', length) == expected


@pytest.mark.parametrize('num_shards', [1, 2])
def test_each_epoch_has_every_example_once_and_hosts_share_it(num_shards):
  cfg = config('tiny_texts', shuffle=True, batch_size=6)
  rows = []
  for shard in range(num_shards):
    dataset = datasets.training_dataset(cfg, ClassificationFeatureConverter, shard, num_shards)
    rows.append([x['encoder_input_tokens'] for x in dataset.take(3).as_numpy_iterator()])
  epochs = [sorted(np.concatenate(parts).tolist()) for parts in zip(*rows, strict=True)]
  assert epochs[0] == epochs[1] == epochs[2]
  assert len(epochs[0]) == len(TEXTS)


def test_a_task_of_seqio_will_do():
  """With the same features, through SeqIO's own shuffling and trimming."""
  examples = {'inputs': tf.ragged.constant([ids(text) * 2 for text in TEXTS], tf.int32)}
  labels = np.arange(6, dtype=np.int32)[:, None]
  seqio.TaskRegistry.add(
    'plain_texts',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
        {**examples, 'label': labels}
      ),
      splits=['train'],
    ),
    preprocessors=[],
    output_features={
      'inputs': seqio.Feature(seqio.ByteVocabulary(), add_eos=False),
      'label': seqio.Feature(seqio.PassThroughVocabulary(6), add_eos=False),
    },
  )
  found = joined(batches('plain_texts'))
  seqio.TaskRegistry.remove('plain_texts')
  assert found['label'][:6].tolist() == list(range(6))
  assert found['encoder_lengths'][:6].tolist() == [min(2 * len(ids(t)), LENGTH) for t in TEXTS]


def test_seqio_evaluates_exactly():
  evaluator = seqio.Evaluator(
    'tiny_texts',
    ClassificationFeatureConverter(),
    eval_split='train',
    sequence_length={'inputs': LENGTH},
  )
  logits = np.random.default_rng(0).normal(size=[6, 3])
  log_probabilities = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  labels = np.arange(6) % 3

  def score(dataset, model_feature_shapes=None):
    number = [int(i) for i, _ in dataset.as_numpy_iterator()]
    scores = [(i, log_probabilities[i, labels[i]]) for i in number]
    return scores, {'log_probabilities': [log_probabilities[i] for i in number]}

  metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score)
  found = metrics.result()['tiny_texts']
  expected = np.mean(np.argmax(logits, axis=1) == labels)
  assert found['accuracy'] == pytest.approx(expected)
  nats = -np.mean(log_probabilities[np.arange(6), labels])
  assert found['cross_entropy'] == pytest.approx(nats)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('tiny_texts', {'split': 'wrong'}, 'class 3: its classes are 0 to 2'),
    ('tiny_texts', {'task_feature_lengths': {'targets': 8}}, "such as {'inputs': 512}"),
    ('tiny_numbers', {'task_feature_lengths': {'inputs': 7}}, "give {'inputs': 8}"),
  ],
)
def test_refusals(name, changes, message):
  cfg = config(name)
  for setting, value in changes.items():
    setattr(cfg, setting, value)
  converter = functools.partial(ClassificationFeatureConverter, real_inputs=name == 'tiny_numbers')
  with pytest.raises(ConfigError, match=message):
    datasets.check(cfg, converter)


NUMBERS = np.zeros(LENGTH)
IDS = {'vocabulary': seqio.ByteVocabulary()}
PAIR = {**IDS, 'pair': True}
WRONG = [
  ({}, Example(NUMBERS, 3), 'of class 3: its classes are 0 to 2'),
  ({}, Example(NUMBERS, -1), 'of class -1'),
  ({}, Example(NUMBERS, 0.5), 'label 0.5 is no integer: classes are 0 to 2'),
  ({}, Example(NUMBERS, 1.0), 'label 1.0 is no integer'),
  ({}, Example(NUMBERS, float('nan')), 'label nan is no integer'),
  ({}, Example(NUMBERS, '1'), "label '1' is no integer"),
  ({}, Example(NUMBERS, np.array([1])), 'is no integer'),
  ({}, Example(NUMBERS, [[1], [1, 2]]), 'is no integer'),
  ({}, Example(NUMBERS, 2**70), 'is no integer'),
  ({}, (NUMBERS, 1), 'is no classification.Example'),
  ({}, Example('sea', 1), "text 'sea': give a sequence of numbers, or the task a vocabulary"),
  ({}, Example(np.zeros([3, 3]), 1), r'shape \(3, 3\): give a sequence of numbers: flatten it'),
  ({}, Example([[1], [1, 2]], 1), 'give a sequence of numbers: flatten it'),
  ({}, Example(1.0, 1), 'give a sequence of numbers'),
  ({}, Example(['1', '2'], 1), 'give a sequence of numbers'),
  ({}, Example([0, np.nan], 1), 'not finite'),
  ({}, Example([0, 1e300], 1), 'not finite'),
  ({}, Example(None, 1), 'it has no inputs'),
  ({}, Example(NUMBERS, 1, NUMBERS), 'inputs2, which .* registered with pair=True'),
  ({'sequence_len': 8}, Example(np.zeros(9), 1), 'length 9, .* sequence_len = 8'),
  ({**IDS, 'sequence_len': 8}, Example('sea', 1), 'length 3, .* sequence_len = 8'),
  (IDS, Example(NUMBERS, 1), 'float64: give a text, or a sequence of integer ids'),
  (IDS, Example([3, 2**31], 1), 'ids from 3 to 2147483648: those .* are 0 to 258'),
  (IDS, Example([-1], 1), 'ids from -1 to -1'),
  (IDS, Example('sea', 1, 'sky'), 'inputs2, which .* registered with pair=True'),
  (PAIR, Example('sea', 1), 'it has no inputs2'),
  ({'vocabulary': seqio.PassThroughVocabulary(9)}, Example('sea', 1), "text 'sea': give ids"),
]


@pytest.fixture
def own():
  """Registers a task of given examples."""

  def add(found, num_classes=3, **settings):
    return classification.register(
      'own', __name__, lambda split: found, ['train'], num_classes, **settings
    )

  yield add
  if 'own' in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove('own')


@pytest.mark.parametrize(('settings', 'wrong', 'message'), WRONG)
def test_an_example_that_is_refused(own, settings, wrong, message):
  """Before the run and, of images, where it is read."""
  good = Example('two seas' if 'vocabulary' in settings else NUMBERS, 1)
  if isinstance(settings.get('vocabulary'), seqio.PassThroughVocabulary):
    good = Example([1, 2], 1)
  task = own(
    [good._replace(inputs2=good.inputs if 'pair' in settings else None), wrong], **settings
  )
  message = f"task own, split 'train', example 1 .*: .*{message}"
  if 'sequence_len' not in settings:
    with pytest.raises(ConfigError, match=message):
      classification.num_cut(task, 'train', LENGTH)
  with pytest.raises(ConfigError, match=message):
    batches('own')


@pytest.mark.parametrize('found', [None, (x for x in ()), {0: 1}, {1}])
def test_examples_are_a_sequence(own, found):
  own(found)
  with pytest.raises(ConfigError, match="of own, split 'train', are of type .*: give a sequence"):
    batches('own')


def test_an_empty_split_is_refused(own):
  own([])
  converter = functools.partial(ClassificationFeatureConverter, real_inputs=True)
  with pytest.raises(ConfigError, match="The split 'train' of own is empty"):
    datasets.check(config('own'), converter)


def test_what_is_accepted(own):
  """Labels and inputs in the types that arrays and files give."""
  labels = [1, True, np.int64(2), np.uint8(1), np.array(2), jax.numpy.int32(0)]
  rows = [
    [],
    [1, 0],
    np.ones(3, bool),
    np.ones(2, np.float16),
    jax.numpy.ones(2, 'bfloat16'),
    [1.5],
  ]
  own([Example(x, label) for x, label in zip(rows, labels, strict=True)])
  found = joined(batches('own'))
  assert found['label'][:6].tolist() == [1, 1, 2, 1, 2, 0]
  assert found['encoder_lengths'][:6].tolist() == [0, 2, 3, 2, 2, 1]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    *[({'num_classes': n}, 'num_classes = .* at least 2') for n in (1, 0, 2.0, True, None, '3')],
    *[({'sequence_len': n}, 'sequence_len = .* at least 1, or None') for n in (0, -1, 4.0, True)],
    ({'vocabulary': 'bytes'}, "vocabulary = 'bytes' .* a seqio.Vocabulary, or None"),
    ({'vocabulary': seqio.ByteVocabulary}, 'vocabulary = .* a seqio.Vocabulary, or None'),
  ],
)
def test_registrations_that_are_refused(own, settings, message):
  with pytest.raises(ConfigError, match=rf"register\('own'\): {message}"):
    own([], **settings)
  assert 'own' not in seqio.TaskRegistry.names()


def test_a_language_model_has_no_use_for_it():
  with pytest.raises(ConfigError, match="no output feature 'targets'"):
    datasets.vocabulary('tiny_texts')
