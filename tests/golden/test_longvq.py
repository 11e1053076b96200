"""A LongVQ block beside a dense oracle of its definition: values, codes and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import needs
from util import call_of

from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.longvq.longvq import LongVQ
from tvq_t5x.network.mlp import Mlp

# The names in the files of parameters [D, H * width] or [H * width], and ours.
_HEADS = {'z': 'shared', 'v': 'value', 'r': 'reset'}


def config_of(case, **overrides):
  r = case.reference
  fields = {
    'vocab_size': 2,
    'emb_dim': r['D'],
    'num_heads': r['H'],
    'key_dim': r['K'],
    'value_dim': r['V'],
    'num_layers': 1,
    'num_codes': r['S'],
    'block_len': r['L'],
    'window_len': r['M'],
    'mlp_dim': 2 * r['D'],
    'mlp_activation': 'silu',
    'bidirectional': r['bidirectional'],
  }
  return TransformerConfig(**{**fields, **overrides})


def params_of(case, arrays):
  """Arrays by their names in the files, in our layout: the block's, and those of its MLP."""
  r = case.reference
  h = r['H']

  def heads(x):
    return x.reshape(*x.shape[:-1], h, -1)

  block = {
    'norm': {'scale': arrays['norm_g'], 'bias': arrays['norm_b']},
    **{
      ours: {'kernel': heads(arrays[f'W{name}']), 'bias': heads(arrays[f'b{name}'])}
      for name, ours in _HEADS.items()
    },
    'query_scale': arrays['aq'],
    'query_shift': arrays['cq'],
    'key_scale': arrays['ak'],
    'key_shift': arrays['ck'],
    'quantizer': {'c_sum': arrays['c_sum'], 'c_count': arrays['c_count']},
    'window_bias': arrays['bias'],
    'update': {'kernel': arrays['Wu'], 'bias': arrays['bu']},
    'candidate': {'kernel': arrays['Wh'], 'bias': arrays['bh']},
    'out': {'kernel': arrays['Uh'].reshape(h, -1, arrays['Uh'].shape[-1])},
    'ssm': {
      'log_decay': arrays['ssm_a'],
      'frequency': arrays['ssm_w'],
      'log_dt': arrays['ssm_log_dt'],
      'd': arrays['ssm_d'],
      **{
        ours: arrays[f'ssm_{name}']
        for name, ours in {
          'B_re': 'b_re', 'B_im': 'b_im', 'C_re': 'c_re', 'C_im': 'c_im', 'C2_re': 'c2_re',
          'C2_im': 'c2_im',
        }.items()
        if f'ssm_{name}' in arrays
      },
    },
  }  # fmt: skip
  mlp = {}
  if r['ffn']:
    mlp = {
      'norm': {'scale': arrays['ffn_g'], 'bias': arrays['ffn_b']},
      'wi': {'kernel': arrays['W1']},
      'wo': {'kernel': arrays['W2']},
    }
  return jax.tree.map(jnp.asarray, {'block': block, 'mlp': mlp})


def modules(case, **overrides):
  c, r = config_of(case), case.reference
  fields = {'state_size': r['N'], **overrides}
  return LongVQ(c, **fields), Mlp(c)


def run(case, block, mlp, params, x, state=None, mask=None, **call):
  """The output of block and MLP, the new state, the losses, and what the block shows inside."""
  mask = case['mask'] if mask is None else mask
  (branch, state, aux), inside = block.apply(
    {'params': params['block']}, x, state, call_of(mask, **call), mutable=['intermediates']
  )
  y = x + branch
  if params['mlp']:
    y = y + mlp.apply({'params': params['mlp']}, y, (), None)[0]
  return y, state, aux, inside['intermediates']


def assert_near(found, expected, what):
  """1e-5, or 1e-4 of the largest entry."""
  expected = np.asarray(expected)
  limit = max(1e-5, 1e-4 * float(np.max(np.abs(expected), initial=0)))
  np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=what)


@needs('params/Wz')
@pytest.mark.parametrize(('reduction', 'chunk_len'), [('serial', 7), ('matmul', 1024)])
def test_values_codes_and_gradients(case, reduction, chunk_len):
  block, mlp = modules(case, chunk_len=chunk_len)
  params = params_of(case, case.tree('params/'))
  block = block.clone(config=config_of(case, reduction=reduction))

  @jax.jit
  def value_and_grad(params, x):
    def loss(params, x):
      y, _, aux, inside = run(case, block, mlp, params, x)
      commit = aux['commit_loss'].total
      return jnp.sum(case['weights'] * y) + 0.1 * commit, (y, commit, inside)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

  (loss, (y, commit, inside)), (by_params, by_x) = value_and_grad(params, jnp.asarray(case['X']))
  shown = case['mask'][..., None] > 0
  np.testing.assert_array_equal(
    np.where(shown, inside['codes'][0], -1), np.where(shown, case['codes'], -1)
  )
  assert_near(np.where(shown, y, 0), np.where(shown, case['Y'], 0), 'Y')
  assert_near(commit, case['commit'], 'commit')
  np.testing.assert_allclose(loss, case['loss'], rtol=1e-4, atol=1e-4)
  assert_near(by_x, case['grad_X'], 'X')
  expected = params_of(case, case.tree('grads/'))
  for (path, found), grad in zip(
    jax.tree_util.tree_leaves_with_path(by_params), jax.tree.leaves(expected), strict=True
  ):
    assert_near(found, grad, jax.tree_util.keystr(path))


@needs('params/Wz')
def test_segments_and_single_tokens(case):
  if case.reference['bidirectional']:
    pytest.skip('All positions attend to all: there are no segments.')
  block, mlp = modules(case, chunk_len=5)
  params, x = params_of(case, case.tree('params/')), jnp.asarray(case['X'])
  length = x.shape[1]

  @jax.jit
  def segment(x, state, position):
    return run(case, block, mlp, params, x, state, jnp.ones(x.shape[:2]), position=position)[:2]

  block_len = case.reference['L']
  state, parts = block.init_state(len(x)), []
  for start, stop in ((0, 2 * block_len), (2 * block_len, 3 * block_len), (3 * block_len, length)):
    y, state = segment(x[:, start:stop], state, start)
    parts.append(y)
  assert_near(jnp.concatenate(parts, axis=1), case['Y'], 'segments')

  @jax.jit
  def token(state, i):
    one = jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
    mask = jnp.ones([len(x), 1])
    y, state, _, _ = run(case, block, mlp, params, one, state, mask, position=i, step=i)
    return state, y

  state, y = jax.lax.scan(token, block.for_tokens(block.init_state(len(x))), jnp.arange(length))
  assert_near(jnp.swapaxes(y[:, :, 0], 0, 1), case['Y'], 'tokens')
  in_order = block.from_tokens(state, jnp.int32(length))
  whole = jax.jit(block.apply)(
    {'params': params['block']}, x, None, call_of(jnp.ones(x.shape[:2]))
  )[1]
  for found, expected in zip(jax.tree.leaves(in_order), jax.tree.leaves(whole), strict=True):
    assert_near(found, expected, 'state')
