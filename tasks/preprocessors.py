"""SeqIO preprocessors: from tokenized documents to full training sequences."""

from collections.abc import Mapping

import seqio
import tensorflow as tf


def pack_documents(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int] | None,
  output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
  """Lays the documents end to end and cuts the stream into full sequences.

  No token is dropped, reordered or repeated, and no sequence but the last holds fewer than
  `sequence_length['targets']` tokens: a document longer than that goes on in the next sequence, and
  the next document starts where it ends. Put `seqio.preprocessors.append_eos` before this, so that
  documents stay separated.

  Args:
    dataset: tokenized documents; features other than 'targets' are dropped.
    sequence_length: given by SeqIO. Where it is None or has no 'targets', documents stay whole.
    output_features: given by SeqIO.

  Returns:
    a dataset of {'targets': tokens}.
  """
  length = (sequence_length or {}).get('targets')
  dtype = output_features['targets'].dtype
  tokens = dataset.map(
    lambda example: tf.cast(example['targets'], dtype), num_parallel_calls=tf.data.AUTOTUNE
  )
  if length is not None:
    tokens = tokens.rebatch(length)
  return tokens.map(lambda targets: {'targets': targets}, num_parallel_calls=tf.data.AUTOTUNE)
