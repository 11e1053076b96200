"""With JAX's numbers of 64 bits, which T5X may be run with, a model computes the same."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import seqio
from util import assert_close, random_batch, random_params, small_config

from tvq_t5x.network import decoding
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import optimizers
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.random_keys import key_of
from tvq_t5x.training.train_state import init_train_state
from tvq_t5x.training.train_step import train_on_sequences

_MODELS = {
  'hybrid_bfloat16': {
    'sublayers': ('quadratic', 'vq', 'mlp'),
    'kv_cache_len': 40,
    'absolute_positions': True,
    'num_layers': 1,
    'scan_layers': False,
    'dtype': 'bfloat16',
  },
}


def _model(fields):
  rates = {'sinusoid_dropout_rate': 0.1, 'residual_dropout_rate': 0.1, 'layer_drop_rate': 0.1}
  config = small_config(**rates, **fields)
  optimizer = optimizers.adamw(optimizers.warmup_cosine(0.1, 2, 10), clip_norm=1.0)
  return TransformerVQModel(Transformer(config), seqio.PassThroughVocabulary(11), optimizer)


def _all(fields):
  """What there is to compute with a model: updates, evaluation, scores and samples."""
  model = _model(fields)
  batch = {name: np.asarray(x) for name, x in random_batch(model.config, 4, 16).items()}
  rng = key_of(3, 'seed')
  state = jax.jit(lambda rng: init_train_state(model, rng, 4))(rng)
  state, metrics = jax.jit(
    lambda state, batch, rng: train_on_sequences(model, state, batch, rng, 8, 2)
  )(state, batch, rng)
  params = random_params(model.config)
  found = {
    'state': state,
    'metrics': metrics,
    'evaluation': jax.jit(model.eval_fn)(params, batch),
    'score': jax.jit(model.score_batch)(params, batch),
  }
  prompts = {**batch, 'decoder_target_tokens': batch['decoder_target_tokens'] * (np.arange(16) < 5)}
  found['samples'] = jax.jit(
    lambda params, batch, rng: model.predict_batch_with_aux(
      params, batch, rng, 0.9, 0.95, 4, num_decodes=2, return_all_decodes=True
    )
  )(params, prompts, rng)

  def generate(params, rng):
    state = decoding.start(model.module, 3)
    lengths = np.array([0, 5, 9], np.int32)
    state, total, nats = decoding.read(
      model.module, params, state, batch['decoder_target_tokens'][:3, :9], lengths
    )
    return total, nats, decoding.generate(model.module, params, state, 7, rng, SamplingConfig())

  found['generated'] = jax.jit(generate)(params, rng)
  return jax.device_get(found)


@pytest.mark.slow
@pytest.mark.parametrize('fields', _MODELS.values(), ids=_MODELS)
def test_all_is_as_without_numbers_of_64_bits(fields):
  expected = _all(fields)
  with jax.enable_x64(True):
    found = _all(fields)
  assert_close(found, expected, atol=1e-6, rtol=1e-6)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  for (path, ours), theirs in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert ours.dtype == theirs.dtype, jax.tree_util.keystr(path)


def test_t5x_s_programs_may_promote(monkeypatch):
  """The gin files for them import the adapter."""
  monkeypatch.setenv('JAX_NUMPY_RANK_PROMOTION', 'raise')
  monkeypatch.setenv('JAX_NUMPY_DTYPE_PROMOTION', 'strict')
  lines = (
    'import jax',
    'from tvq_t5x import t5x_adapter',
    'print(jax.numpy.ones([2, 1]) * jax.numpy.arange(3))',
  )
  subprocess.run([sys.executable, '-c', '\n'.join(lines)], check=True)
