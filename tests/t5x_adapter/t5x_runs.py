"""T5X's programs, run in this process on a mesh of the tests' virtual devices."""

import contextlib
import gc
import importlib
import pathlib
import sys
from unittest import mock

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from mesh_util import assert_same_numbers, by_name
from t5x import gin_utils, partitioning, utils
from tensorboard.backend.event_processing import event_accumulator
from tensorflow import make_ndarray
from util import one_device

from tvq_t5x import train as standalone
from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import configuration
from tvq_t5x.t5x_adapter.trainer import Trainer
from tvq_t5x.training.partitioning import own_axis_rules, sequence_axis_rules

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / 'tests' / 'tiny.gin')
TINY_MODEL = str(ROOT / 'tests' / 'tiny_model.gin')
STEPS = 20
# Of tests/tiny.gin, made short: all that is set here is the same in both engines.
SHORT = {
  'TRAIN_STEPS': STEPS,
  'LOG_PERIOD': 2,
  'EVAL_PERIOD': STEPS,
  'CHECKPOINT_PERIOD': STEPS // 2,
}


@contextlib.contextmanager
def mesh(data, model):
  """Makes T5X use a data x model mesh: on CPU, it has one of processes x local devices only."""
  devices = np.array(jax.devices()[: data * model]).reshape(data, model)
  with mock.patch.object(
    partitioning, 'default_mesh', lambda *args, **kwargs: Mesh(devices, ('data', 'model'))
  ):
    yield


def bindings(**macros):
  """Macros as gin bindings."""
  return [f'{name} = {value!r}' for name, value in macros.items()]


def run(program, function, files, settings, shape=(1, 1)):
  """What `python -m t5x.PROGRAM` does with gin files and bindings, on a mesh of this shape."""
  module = importlib.import_module(f't5x.{program}')
  main = sys.modules['__main__']
  sys.modules['__main__'] = module  # The name that gin files have for it.
  gin.clear_config()
  # TensorFlow's assertions flush every summary writer that is there when they are traced, those of
  # earlier runs too, which are gone when they run.
  gc.collect()
  try:
    with mesh(*shape):
      gin_utils.parse_gin_flags([str(ROOT)], files, settings)
      return gin.get_configurable(getattr(module, function))()
  finally:
    sys.modules['__main__'] = main


def train(folder, *settings, shape=(1, 1), files=(TINY,), **macros):
  """Trains into a MODEL_DIR; returns the last step and train state."""
  macros = {**SHORT, 'MODEL_DIR': str(folder), **macros}
  return run('train', 'train', list(files), [*bindings(**macros), *settings], shape)


def train_standalone(folder, *settings, files=(TINY,), **macros):
  """The same with the standalone runner, on the same one device."""
  macros = {**SHORT, 'SAMPLE_PERIOD': STEPS, 'MODEL_DIR': str(folder), **macros}
  with one_device():
    assert standalone.run(list(files), [*bindings(**macros), *settings]) == 0


def arrays(folder, step):
  """A checkpoint's arrays by name ('target/logits/kernel')."""
  path = layout.folder(folder, step) / layout.STATE
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  # On the host: the devices that saved may have been others.
  saved = checkpointer.metadata(path).item_metadata.tree
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
  return by_name(checkpointer.restore(path, restore_args=args))


def scalars(folder):
  """What T5X wrote for TensorBoard: {name: {step: value}}."""
  events = event_accumulator.EventAccumulator(str(folder), size_guidance={'tensors': 0})
  events.Reload()
  tags = events.Tags()['tensors']
  return {tag: {e.step: _value(e) for e in events.Tensors(tag)} for tag in tags}


def _value(event):
  value = make_ndarray(event.tensor_proto)
  return float(value) if value.ndim == 0 and value.dtype.kind == 'f' else value


def partitioner(shape, dims=(1, 1), by_sequence=False):
  """T5X's, with our rules, for activations and parameters partitioned in 1 or 2 dimensions."""
  rules = partitioning.standard_logical_axis_rules(*dims, own_axis_rules())
  rules = sequence_axis_rules(rules, shape[1] if by_sequence else 1)
  made = partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)
  with mesh(*shape):
    assert made.mesh.shape == {'data': shape[0], 'model': shape[1]}
  return made


def trainer(model, folder, places, update_len=None, num_microbatches=1):
  """The trainer of a model from scratch, made as `t5x.train` makes it."""
  initializer = utils.TrainStateInitializer(
    model.optimizer_def, model.get_initial_variables, {'decoder_input_tokens': (8, 8)}, places
  )
  return Trainer(
    model=model,
    train_state=initializer.from_scratch(jax.random.key(1)),
    partitioner=places,
    eval_names=[],
    summary_dir=str(folder),
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.key(2),
    learning_rate_fn=lambda step: 0.1,
    num_microbatches=num_microbatches,
    update_len=update_len,
  )


def assert_same_arrays(folder, expected, step=STEPS, tolerance=1e-5):
  """Checkpoints of two runs, within a tolerance relative to each array's largest entry."""
  found, expected = arrays(folder, step), arrays(expected, step)
  assert_same_numbers(found, expected, tolerance)
  assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in expected.items()}


def load(folder, step=STEPS):
  """The model and parameters of a checkpoint, without T5X."""
  with one_device():
    return configuration.load(str(layout.folder(folder, step)), [TINY])
