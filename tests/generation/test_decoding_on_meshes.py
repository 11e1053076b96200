"""Reading and generating with the model shared by devices: the same tokens, few exchanges."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_util import by_name
from util import HEADS, assert_close, lines_in_loops, random_params, random_tokens, small_model

from tvq_t5x.network import decoding
from tvq_t5x.network.decoding import GenerationState
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.planning import collectives
from tvq_t5x.training import placement
from tvq_t5x.training.partitioning import Partitioner

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 4, reason='XLA_FLAGS is set in the environment, without 4 CPU devices'
)
SAMPLED = SamplingConfig(top_p=0.9)
LENGTHS = np.array([0, 3, 4, 7])
BATCH, PROMPT, NEW = len(LENGTHS), 7, 9
# All divisible by 2, and the window is no multiple of the block.
SIZES = {'vocab_size': 12, 'num_codes': 6, 'value_dim': 8, 'window_len': 6}
CASES = {**HEADS, 'mqa': {'head_type': 'mqa', 'num_heads': 2}}


class Generation:
  """Programs on a data x model mesh: one reads prompts, one generates."""

  def __init__(self, devices, num_partitions, **overrides):
    model = small_model(**{**SIZES, **overrides})
    self.config, module = model.config, model.module
    partitioner = Partitioner(num_partitions, devices=devices)
    placement.validate(partitioner, self.config, BATCH)
    self._abstract_params = placement.abstract_params(partitioner, model)
    self._placement = jax.tree.map(lambda x: x.sharding, self._abstract_params)
    states = GenerationState(
      placement.decoder_state_shardings(partitioner, self.config), partitioner.batch_sharding()
    )
    prompts = random_tokens(self.config, BATCH, PROMPT)

    def start():
      return decoding.start(module, BATCH)._replace(token=jnp.full([BATCH], 2, jnp.int32))

    def read(params):
      return decoding.read(module, params, start(), prompts, LENGTHS)[0]

    def generate(params, state, rng):
      return decoding.generate(module, params, state, NEW, rng, SAMPLED)

    self._abstract_state = jax.eval_shape(start)
    self._read = partitioner.jit(read, (self._placement,), states)
    self._generate = partitioner.jit(
      generate, (self._placement, states, None), (None, None, states)
    )

  @functools.cached_property
  def _params(self):
    return jax.device_put(random_params(self.config), self._placement)

  def read(self):
    return self._read(self._params)

  def run(self):
    return self._generate(self._params, self.read(), jax.random.key(0))

  def lower(self):
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return self._generate.lower(self._abstract_params, self._abstract_state, rng)


@functools.cache
def expected(heads):
  return jax.device_get(Generation(cpus(1), 1, **CASES[heads]).run())


def cpus(count):
  return jax.devices('cpu')[:count]


@pytest.fixture(params=['cpu', 'tpu'])
def two_devices(request):
  return cpus(2) if request.param == 'cpu' else request.getfixturevalue('tpus')('v5e:1x2')


@pytest.mark.parametrize(
  ('heads', 'num_devices'),
  [
    ('gated_single', 4),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in (('gated_single', 2), ('mha', 2), ('mha', 4))
    ),
  ],
)
def test_tokens_are_the_same_on_every_mesh(heads, num_devices):
  tokens, scores, state = Generation(cpus(num_devices), 2, **CASES[heads]).run()
  np.testing.assert_array_equal(tokens, expected(heads)[0])
  assert_close((scores, state), expected(heads)[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('heads', ['gated_single', 'mha', 'mqa'])
def test_devices_share_the_state(heads, scan_layers):
  """Of a single gated head the values, of more the heads."""
  generation = Generation(cpus(4), 2, scan_layers=scan_layers, **CASES[heads])
  for name, x in by_name(generation.read().decoder.layers).items():
    values = heads == 'gated_single' and name.endswith(('values', 'means'))
    parts = 4 if heads == 'mha' or values else 2
    assert x.size == parts * x.addressable_shards[0].data.size, name


@pytest.mark.parametrize('heads', ['gated_single', 'mha'])
def test_a_token_takes_one_exchange_a_sublayer_and_two_more(heads, two_devices):
  """For the embedding and the logits: devices wait for each of them."""
  generation = Generation(two_devices, 2, scan_layers=False, **CASES[heads])
  lines = lines_in_loops(generation.lower().compile().as_text())
  exchange = rf' ({"|".join(collectives.KINDS)})(-start)?\('
  found = [line for line in lines if re.search(exchange, line)]
  config = generation.config
  sublayers = len(config.layer_sublayers)
  assert len(found) == config.num_layers * sublayers + 2, found
