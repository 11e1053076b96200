"""The SeqIO feature converter of Transformer-VQ."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from tvq_t5x.common.tokens import EOS


class TransformerVQFeatureConverter(seqio.LMFeatureConverter):
  """Turns sequences of tokens into the features of the model.

  A sequence starts from EOS, as if a document had just ended:

      targets               = [3, 9, 1, 4]
      decoder_target_tokens = [3, 9, 1, 4, 0]
      decoder_input_tokens  = [1, 3, 9, 1, 4]
      decoder_loss_weights  = [1, 1, 1, 1, 0]

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

  def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    example = dict(super()._convert_example(features))
    example['decoder_loss_weights'] = tf.cast(example['decoder_loss_weights'], tf.float32)
    return example
