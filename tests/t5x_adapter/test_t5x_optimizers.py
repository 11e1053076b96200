"""The optimizers in T5X: the same updates, placed with the parameters, and not for codebooks."""

import jax
import numpy as np
import pytest
import seqio
from flax.core import freeze, unfreeze
from util import random_params

pytest.importorskip('t5x.train', reason='T5X is not installed: optimizers in it')

import t5x_runs
from mesh_util import by_name
from small_runs import ONE_LAYER, Reference, Run, assert_same, make_model
from t5x.train_state import FlaxOptimTrainState

from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.t5x_adapter.optimizer import OptaxWrapper
from tvq_t5x.training import optimizers
from tvq_t5x.training.models import TransformerVQModel

# Wide enough for Adafactor to factor the moments of matrices.
_WIDE = {'emb_dim': 128, 'head_type': 'mha', 'num_heads': 2, 'scan_layers': True}


def test_lion(tmp_path):
  run = Run(make_model('lion'), tmp_path, (2, 4))
  assert_same(run, Reference(make_model('lion')))
  kernel = 'layers_0/attention_0/gate/kernel'
  of_kernel = {shape for name, shape in run.shapes.items() if name.endswith(kernel)}
  assert of_kernel == {(32, 1, 64 // 4)}


def test_adafactor_with_factors_on_the_axes_that_are_left(tmp_path):
  run = Run(make_model('adafactor', **_WIDE), tmp_path, (2, 2), (1, 2), num_microbatches=2)
  assert_same(run, Reference(make_model('adafactor', **_WIDE)))
  kernel = 'layers/mlp/wi/kernel'
  shapes = {n: shape for n, shape in run.shapes.items() if n.endswith(kernel)}
  assert shapes.pop(f'target/{kernel}') == (1, 128 // 2, 512 // 2)
  factors = {name.split('/v_')[1].split('/')[0]: x for name, x in shapes.items() if '/v_' in name}
  assert factors == {'row': (1, 128 // 2), 'col': (1, 512 // 2)}
  assert run.shapes['target/layers/attention_0/quantizer/c_sum'] == (1, 2 // 2, 16, 16)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion'])
def test_what_does_not_reach_the_codebooks(name):
  """A rate of zero, a small norm to clip to and a strong decay, in T5X's own train state."""
  optimizer = getattr(optimizers, name)(0.0, weight_decay=0.25, clip_norm=1e-9)
  module = Transformer(TransformerConfig(**ONE_LAYER))
  model = TransformerVQModel(
    module, seqio.PassThroughVocabulary(32), optimizer, optimizer_wrapper=OptaxWrapper
  )
  params, gradients = random_params(model.config), random_params(model.config, seed=1)
  shapes = {'decoder_input_tokens': (8, 8)}
  variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))

  @jax.jit
  def update(params, gradients):
    state = FlaxOptimTrainState.create(model.optimizer_def, freeze({**variables, 'params': params}))
    return unfreeze(state.apply_gradient(freeze(gradients), learning_rate=None).params)

  new = by_name(update(params, gradients))
  old, gradients = by_name(params), by_name(gradients)
  kinds = set()
  for param, x in old.items():
    kind = param.split('/')[-1]
    if kind in ('c_sum', 'c_count'):
      expected = 0.9 * x - 0.1 * gradients[param]
    else:
      expected = x if kind in ('scale', 'bias', 'content_bias', 'position_bias') else 0.75 * x
    np.testing.assert_allclose(new[param], expected, rtol=1e-5, atol=1e-6, err_msg=param)
    kinds.add(kind)
  assert {'c_sum', 'c_count', 'kernel', 'embedding', 'scale', 'bias', 'content_bias'} <= kinds


def test_the_learning_rate_that_is_logged_is_the_optimizers(trained):
  logged = t5x_runs.scalars(trained / 'train')['learning_rate']
  schedule = optimizers.warmup_cosine(1e-2, 4, t5x_runs.STEPS)
  assert sorted(logged) == list(range(2, t5x_runs.STEPS + 1, 2))
  for step, value in logged.items():
    # Of the last of the updates that the step counts.
    assert value == pytest.approx(float(schedule(step - 1)), rel=1e-6)
