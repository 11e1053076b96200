"""The SeqIO feature converters: of language models, and of classifiers."""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import EOS

# A feature that a task may have beside its targets, [N] float32.
LOSS_WEIGHTS = 'loss_weights'


class TransformerVQFeatureConverter(seqio.LMFeatureConverter):
  """Turns sequences of tokens into the features of the model.

  A sequence starts from EOS, as if a document had just ended:

      targets               = [3, 9, 1, 4]
      decoder_target_tokens = [3, 9, 1, 4, 0]
      decoder_input_tokens  = [1, 3, 9, 1, 4]
      decoder_loss_weights  = [1, 1, 1, 1, 0]

  A task whose targets are not all to be learned gives each of them a weight, in a feature
  `loss_weights` of its own that is as long, and 0 or more:

      loss_weights          = [0, 0, 1, 1]
      decoder_loss_weights  = [0, 0, 1, 1, 0]

  The tasks of this package lay documents end to end (`indexed.IndexedTask`), so there is
  nothing left to pack, and the model does not mask attention between documents. `pack`, which
  T5X sets to True by default, is therefore accepted and has no effect.
  """

  MODEL_FEATURES: Mapping[str, seqio.FeatureConverter.FeatureSpec] = {
    **seqio.LMFeatureConverter.MODEL_FEATURES,
    'decoder_loss_weights': seqio.FeatureConverter.FeatureSpec(dtype=tf.float32),
  }

  def __init__(
    self,
    pack: bool = False,
    use_custom_packing_ops: bool = False,
    apply_length_check: bool = True,
    bos_id: int = EOS,
  ):
    del pack, use_custom_packing_ops
    super().__init__(pack=False, apply_length_check=apply_length_check, bos_id=bos_id)

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    lengths = dict(task_feature_lengths)
    spec: Any = ds.element_spec
    if LOSS_WEIGHTS in spec:
      lengths[LOSS_WEIGHTS] = lengths['targets']
    return super()._convert_features(ds, lengths)

  def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    example = dict(super()._convert_example(features))
    weights = tf.cast(example['decoder_loss_weights'], tf.float32)
    if LOSS_WEIGHTS in features:
      weights *= tf.cast(features[LOSS_WEIGHTS], tf.float32)
    return {**example, 'decoder_loss_weights': weights}


class ClassificationFeatureConverter(seqio.FeatureConverter):
  """Turns inputs and a label into the features of a classifier.

      inputs               = [7, 4, 9]
      label                = [2]
      encoder_input_tokens = [7, 4, 9, 0, 0]
      encoder_lengths      = 3
      label                = 2
      label_weights        = 1.0

  Real numbers are `encoder_input_tokens` in float32. Of two texts, the second is `inputs2`, and
  `encoder_input_tokens_2` and `encoder_lengths_2`. The only length to give is that of `inputs`.
  """

  PACKING_FEATURE_DTYPES: Mapping[str, tf.dtypes.DType] = {}
  # Of the task features, those whose length is to be given.
  LENGTHS_TO_GIVE = ('inputs',)

  def __init__(
    self,
    pack: bool = False,
    use_custom_packing_ops: bool = False,
    apply_length_check: bool = True,
    real_inputs: bool = False,
    pair: bool = False,
  ):
    """Creates the converter.

    Args:
      pack: accepted, as T5X sets it by default, and without effect: an example has its own label.
      use_custom_packing_ops: likewise.
      apply_length_check: whether inputs of more than T tokens are refused.
      real_inputs: whether inputs are real numbers and not tokens.
      pair: whether there are two texts.
    """
    del pack, use_custom_packing_ops
    spec = seqio.FeatureConverter.FeatureSpec
    inputs = spec(dtype=tf.float32 if real_inputs else tf.int32)
    texts = ('', '2') if pair else ('',)
    self.TASK_FEATURES = {**{f'inputs{i}': inputs for i in texts}, 'label': spec(dtype=tf.int32)}
    self.MODEL_FEATURES = {
      **{_encoder('input_tokens', i): inputs for i in texts},
      **{_encoder('lengths', i): spec(dtype=tf.int32, rank=0) for i in texts},
      'label': spec(dtype=tf.int32, rank=0),
      'label_weights': spec(dtype=tf.float32, rank=0),
    }
    super().__init__(pack=False, apply_length_check=apply_length_check)
    self._texts = texts

  def task_lengths(self, lengths: Mapping[str, int]) -> Mapping[str, int]:
    """The lengths of all task features from that of `inputs`, which SeqIO wants to be told.

    Raises:
      ConfigError: if there is none.
    """
    if 'inputs' not in lengths:
      raise ConfigError(
        'DatasetConfig.task_feature_lengths', dict(lengths), "such as {'inputs': 512}"
      )
    return {**dict.fromkeys(self.TASK_FEATURES, lengths['inputs']), 'label': 1}

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """See the base class; of the lengths, only that of `inputs` is looked at."""
    return super().__call__(ds, self.task_lengths(task_feature_lengths))

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
    """T for the inputs, and 1 for what an example has one of."""
    length = self.task_lengths(task_feature_lengths)['inputs']
    return {name: length if spec.rank else 1 for name, spec in self.MODEL_FEATURES.items()}

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    length = task_feature_lengths['inputs']

    def convert(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
      found = {'label': tf.reshape(example['label'], []), 'label_weights': tf.constant(1.0)}
      for i in self._texts:
        inputs = example[f'inputs{i}']
        size = tf.size(inputs)
        padded = tf.pad(inputs, [[0, length - size]])
        found[_encoder('input_tokens', i)] = tf.ensure_shape(padded, [length])
        found[_encoder('lengths', i)] = size
      return found

    return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def _encoder(name: str, text: str) -> str:
  return f'encoder_{name}_{text}' if text else f'encoder_{name}'
