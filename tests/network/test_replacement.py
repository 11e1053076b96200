"""Codes set to keys of an update: which keys, in whatever parts a batch comes, and which codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import assert_close, call_of, small_config

from tvq_t5x.network.vq.quantizer import VectorQuantizer, codebook
from tvq_t5x.network.vq.replacement import _LEFT, candidates
from tvq_t5x.training.optimizers import codebook_ema

pytestmark = pytest.mark.quick


def parts_of(mask, num_parts, order):
  """Calls of strided parts of a batch, whose examples come in some order."""
  for i in range(num_parts):
    ids = np.asarray(order[i::num_parts])
    yield ids, call_of(mask[ids], example_ids=jnp.asarray(ids), num_examples=jnp.int32(len(mask)))


# One program a size compiles faster than its operations one by one.
chosen_of = jax.jit(candidates, static_argnums=2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
  examples_of_part=st.integers(1, 3),
  num_parts=st.integers(1, 4),
  length=st.integers(1, 13),
  num_codes=st.integers(1, 40),
  seed=st.integers(0, 99),
)
def test_each_code_has_one_position_of_its_example(
  examples_of_part, num_parts, length, num_codes, seed
):
  rng, number = np.random.default_rng(seed), examples_of_part * num_parts
  mask = rng.random((number, length)) < rng.random((number, 1)) * 1.3
  # Tells where a key is from.
  keys = np.stack(np.broadcast_arrays(*np.ogrid[:number, :length]), axis=-1)[:, :, None] + 1.0
  chosen, found = np.zeros((1, num_codes, 2)), np.zeros(num_codes)
  for ids, call in parts_of(mask, num_parts, rng.permutation(number)):
    of_part = chosen_of(jnp.asarray(keys[ids], jnp.bfloat16), call, num_codes)
    chosen, found = chosen + np.asarray(of_part[0]), found + np.asarray(of_part[1])
  places, seen = chosen[0].astype(int) - 1, set()
  for code in range(num_codes):
    example = code % number
    assert found[code] == mask[example].any()
    if found[code]:
      assert places[code][0] == example and mask[tuple(places[code])]
      seen.add(tuple(places[code]))
  # As many different ones as there are, unless the codes of an example outnumber its positions.
  wanted = [len(range(example, num_codes, number)) for example in range(number)]
  assert len(seen) == sum(min(w, n) for w, n in zip(wanted, mask.sum(axis=1), strict=True))


def updated(config, params, keys, mask):
  """The codebook's averages after one update."""
  module = VectorQuantizer(config)

  def zero(params):
    return module.apply({'params': params}, keys, call_of(mask))[3]['codebook_statistics'].zero

  gradients = jax.jit(jax.grad(zero))(params)
  updates, _ = codebook_ema(config.ema_decay).update(gradients, optax.EmptyState(), params)
  return optax.apply_updates(params, updates)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  keys = jnp.asarray(rng.normal(size=(3, 6, 2, 4)), jnp.float32)
  return keys, np.ones((3, 6), np.float32)


def brought_to(keys, params):
  """Codes [N, S, K] that have gone almost all of the way to their keys."""
  return (1 - _LEFT) * keys + _LEFT * codebook(**params)


_FIELDS = {'head_type': 'mha', 'num_heads': 2, 'ema_decay': 0.9}


def test_unused_codes_become_keys_and_the_others_are_left_alone(batch):
  keys, mask = batch
  rng = np.random.default_rng(1)
  params = {
    'c_sum': jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32),
    # A tenth of the fair share is 0.2 and 0.4; the first code of the second head is just above.
    'c_count': jnp.asarray([[0.19, 4.0, 0.0, 3.0, 2.81], [0.41, 9.19, 0.39, 5.0, 5.01]]),
  }
  dead = np.array([[True, False, True, False, False], [False, False, True, False, False]])
  config = small_config(**_FIELDS, replace_below=0.1)
  found = updated(config, params, keys, mask)
  expected = updated(small_config(**_FIELDS), params, keys, mask)
  codes, _ = candidates(keys, call_of(mask), 5)
  assert_close(codebook(**found)[dead], brought_to(codes, params)[dead])
  least = np.broadcast_to([[0.2], [0.4]], dead.shape)
  assert_close(found['c_count'][dead], (2 * least)[dead].astype(np.float32))
  for name in ('c_sum', 'c_count'):
    np.testing.assert_array_equal(found[name][~dead], expected[name][~dead])


def test_a_codebook_starts_from_keys_and_is_averaged_from_then_on(batch):
  keys, mask = batch
  config = small_config(**_FIELDS, codes_from_keys=True)
  module = VectorQuantizer(config)
  start = module.init(jax.random.key(0), keys, call_of(mask))['params']
  usual = VectorQuantizer(small_config(**_FIELDS))
  ours, others = (
    codebook(**m.init(jax.random.key(0), keys, call_of(mask))['params']) for m in (module, usual)
  )
  assert_close(ours, others)
  # Of the second example nothing counts: its codes start later.
  partly = mask.copy()
  partly[1] = 0
  first = updated(config, start, keys, partly)
  codes, _ = candidates(keys, call_of(partly), 5)
  started = np.array([0, 2, 3])
  assert_close(codebook(**first)[:, started], brought_to(codes, start)[:, started])
  np.testing.assert_array_equal(first['c_count'][:, [1, 4]], 0)
  second = updated(config, first, keys, mask)
  codes, _ = candidates(keys, call_of(mask), 5)
  assert_close(codebook(**second)[:, [1, 4]], brought_to(codes, first)[:, [1, 4]])
  usual_second = updated(small_config(**_FIELDS), first, keys, mask)
  for name in ('c_sum', 'c_count'):
    np.testing.assert_array_equal(second[name][:, started], usual_second[name][:, started])


def test_codes_with_the_same_key_stay_apart():
  """As those of one token in the first layer: rounding would choose between them."""
  keys, mask = jnp.ones([3, 6, 2, 4]), np.ones((3, 6), np.float32)
  config = small_config(**_FIELDS, codes_from_keys=True)
  module = VectorQuantizer(config)
  start = module.init(jax.random.key(0), keys, call_of(mask))['params']
  errors = np.sum(np.square(codebook(**updated(config, start, keys, mask)) - 1), axis=-1)
  assert np.all(np.diff(np.sort(errors, axis=-1)) > 1e-6)


def test_a_code_without_a_candidate_counts_as_unused(batch):
  keys, mask = batch
  params = {'c_sum': jnp.ones([2, 5, 4]), 'c_count': jnp.full([2, 5], 7.0).at[:, 1].set(0.1)}
  mask = mask.copy()
  mask[1] = 0
  found = updated(small_config(**_FIELDS, replace_below=0.5), params, keys, mask)
  assert_close(found['c_count'][:, 1], jnp.full([2], 0.09))
  assert_close(found['c_sum'][:, 1], jnp.full([2, 4], 0.9))
