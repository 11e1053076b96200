"""What a classifier says of each example of a split, written while the split is evaluated."""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.training.base_model import Batch, Model, Params
from tvq_t5x.training.classifier import ClassifierModel
from tvq_t5x.training.partitioning import Partitioner


def classifier_of(model: Model, flag: str) -> ClassifierModel:
  """The model of a checkpoint, if it has classes.

  Args:
    model: to be evaluated.
    flag: that asks for predictions, with its value.

  Raises:
    ConfigError: if it is no classifier.
  """
  if not isinstance(model, ClassifierModel):
    raise ConfigError(
      f'{flag} is for classifiers, and the checkpoint is of a {type(model).__name__}: leave it '
      'out, or try python -m tvq_t5x.sample --score --per_token.'
    )
  return model


def written(
  batches: Iterable[Batch],
  file: BinaryIO,
  model: ClassifierModel,
  partitioner: Partitioner,
  params: Params,
  params_shardings: Any,
) -> Iterator[Batch]:
  """The batches, once the predictions of each are written.

  Args:
    batches: of examples; rows without a weight are left out.
    file: gets a line of JSON for each example: its `label`, the likeliest `class` and the
      `log_probabilities` of all classes.
    model: that predicts.
    partitioner: places batches.
    params: of the model.
    params_shardings: where they lie.
  """
  predict = partitioner.jit(
    model.predict_batch_with_aux,
    in_shardings=(params_shardings, partitioner.batch_sharding()),
    out_shardings=partitioner.replicated(),
  )
  for batch in batches:
    placed = jax.device_put(batch, partitioner.batch_sharding())
    classes, aux = jax.device_get(predict(params, placed))
    for i in np.flatnonzero(batch['label_weights']):
      line = {
        'label': int(batch['label'][i]),
        'class': int(classes[i, 0]),
        'log_probabilities': aux['log_probabilities'][i].tolist(),
      }
      file.write(files.json_line(line).encode())
    yield batch
