"""Texts as features, for the models that T5X exports."""

from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from tvq_t5x.common.tokens import EOS

Features = Mapping[str, tf.Tensor]


def create_preprocessor(
  batch_size: int | None,
  output_features: Mapping[str, seqio.Feature],
  task_feature_lengths: Mapping[str, int],
  tokenized_inputs: bool = False,
) -> tuple[Callable[[tf.Tensor], Features], Sequence[tf.TensorSpec]]:
  """T5X's `create_preprocessor_fn`; its own for decoders takes texts of the same length only.

  Args:
    batch_size: B, of the exported model; None means any.
    output_features: those of the model; 'targets' has the vocabulary.
    task_feature_lengths: T of 'targets'; longer texts are cut.
    tokenized_inputs: whether the model is given tokens [B, T], padded with 0, and not texts [B].

  Returns:
    What makes the features of `TransformerVQFeatureConverter` from a batch, and what a batch is.
  """
  vocabulary, length = output_features['targets'].vocabulary, task_feature_lengths['targets']

  def tokenize(text: tf.Tensor) -> tf.Tensor:
    tokens = vocabulary.encode_tf(text)[:length]
    return tf.ensure_shape(tf.pad(tokens, [[0, length - tf.shape(tokens)[0]]]), [length])

  def preprocess(batch: tf.Tensor) -> Features:
    targets = batch
    if not tokenized_inputs:
      targets = tf.map_fn(tokenize, batch, fn_output_signature=tf.TensorSpec([length], tf.int32))
    return {
      'decoder_target_tokens': targets,
      'decoder_input_tokens': tf.pad(targets[:, :-1], [[0, 0], [1, 0]], constant_values=EOS),
      'decoder_loss_weights': tf.cast(targets != 0, tf.float32),
    }

  if tokenized_inputs:
    return preprocess, [tf.TensorSpec([batch_size, length], tf.int32, name='text_batch')]
  return preprocess, [tf.TensorSpec([batch_size], tf.string, name='text_batch')]
