"""Keys of seeds of 64 bits, without and with JAX's numbers of 64 bits."""

import jax
import numpy as np
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.training.random_keys import key_of

pytestmark = pytest.mark.quick

_SEEDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**32), -(2**63)]


def _bits(key):
  return tuple(np.asarray(jax.random.bits(key, [4], 'uint32')).tolist())


@pytest.mark.parametrize('x64', [False, True])
def test_each_seed_has_its_own_key(x64):
  with jax.enable_x64(x64):
    keys = {seed: _bits(key_of(seed, 'seed')) for seed in _SEEDS}
  assert len(set(keys.values())) == len(_SEEDS)
  assert all(_bits(key_of(seed, 'seed')) == bits for seed, bits in keys.items())
  for seed in range(2**31 - 5, 2**31):  # As JAX has them.
    assert _bits(key_of(seed, 'seed')) == _bits(jax.random.key(seed))


@pytest.mark.parametrize('seed', [2**63, -(2**63) - 1, 0.0, '0', None, True])
def test_other_numbers_are_refused(seed):
  with pytest.raises(ConfigError) as error:
    key_of(seed, 'train.random_seed')
  assert str(error.value).startswith(f'train.random_seed = {seed!r} is not accepted: give a whole')
