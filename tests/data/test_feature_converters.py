import numpy as np
import pytest
import seqio
import tensorflow as tf

from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

pytestmark = pytest.mark.quick


def convert(sequences, length, **kwargs):
  dataset = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(sequences, tf.int32)).map(
    lambda targets: {'targets': targets}
  )
  converter = TransformerVQFeatureConverter(**kwargs)
  return list(converter(dataset, {'targets': length}).as_numpy_iterator())


# T5X constructs a converter with these two arguments.
@pytest.mark.parametrize(
  'kwargs',
  [{}, *({'pack': p, 'use_custom_packing_ops': c} for p in (0, 1) for c in (0, 1))],
)
def test_features(kwargs):
  full, short = convert([[3, 9, 1, 4], [258, 1]], 4, **kwargs)
  assert full.keys() == TransformerVQFeatureConverter.MODEL_FEATURES.keys()
  np.testing.assert_array_equal(full['decoder_target_tokens'], [3, 9, 1, 4])
  np.testing.assert_array_equal(full['decoder_input_tokens'], [1, 3, 9, 1])
  np.testing.assert_array_equal(full['decoder_loss_weights'], [1, 1, 1, 1])
  np.testing.assert_array_equal(short['decoder_target_tokens'], [258, 1, 0, 0])
  np.testing.assert_array_equal(short['decoder_input_tokens'][:2], [1, 258])
  np.testing.assert_array_equal(short['decoder_loss_weights'], [1, 1, 0, 0])


def test_loss_weights_of_a_task():
  dataset = tf.data.Dataset.from_tensors({'targets': [3, 9, 1], 'loss_weights': [0.0, 0.5, 1.0]})
  (example,) = TransformerVQFeatureConverter()(dataset, {'targets': 4}).as_numpy_iterator()
  np.testing.assert_array_equal(example['decoder_loss_weights'], [0, 0.5, 1, 0])


def test_dtypes():
  (example,) = convert([[3, 1]], 4)
  assert {name: value.dtype for name, value in example.items()} == {
    'decoder_target_tokens': np.int32,
    'decoder_input_tokens': np.int32,
    'decoder_loss_weights': np.float32,
  }


def test_packing_adds_no_feature():
  converter = TransformerVQFeatureConverter(pack=True)
  assert not converter.pack
  assert converter.get_model_feature_lengths({'targets': 8}) == dict.fromkeys(
    converter.MODEL_FEATURES, 8
  )


def test_text_bytes_are_never_padding():
  vocabulary = seqio.ByteVocabulary()
  ids = vocabulary.encode_tf(tf.constant(bytes(range(256)))).numpy()
  assert ids.tolist() == [byte + 3 for byte in range(256)]


def test_a_sequence_that_is_too_long_is_refused():
  with pytest.raises(tf.errors.InvalidArgumentError, match='targets'):
    convert([[3, 4, 5, 6, 7]], 4)
