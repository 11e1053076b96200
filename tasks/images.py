"""What tasks of images have in common."""

from collections.abc import Callable
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import indexed, vocabularies

SHAPE = (64, 64, 3)


@seqio.map_over_dataset
def flatten_pixels(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """An image [height, width, channels] uint8 as tokens in raster order, value + 3."""
  values = tf.reshape(example['targets'], [-1])
  return {'targets': tf.cast(values, tf.int32) + FIRST_BYTE}


def real_numbers(pixels: np.ndarray) -> np.ndarray:
  """Pixels [height, width] uint8 as real numbers from -1 to 1 in raster order, [n] float32."""
  return (pixels.reshape(-1) / 127.5 - 1).astype(np.float32)


def image_task(
  name: str,
  module: str,
  source: seqio.DataSource,
  task_cls: Callable[..., indexed.IndexedTask],
  **kwargs: Any,
) -> seqio.Task:
  """Registers a task whose sequences are images, value by value, without EOS.

  Args:
    name: of the task.
    module: `__name__` of the module that calls this.
    source: of {'targets': image} with images of `SHAPE`, uint8.
    task_cls: an `indexed.IndexedTask`.
    **kwargs: what `task_cls` needs.
  """
  vocabulary = vocabularies.ImageVocabulary(SHAPE)
  return indexed.register(
    name,
    module,
    source=source,
    preprocessors=[flatten_pixels],
    output_features={'targets': seqio.Feature(vocabulary, add_eos=False)},
    task_cls=task_cls,
    sequence_len=SHAPE[0] * SHAPE[1] * SHAPE[2],
    **kwargs,
  )
