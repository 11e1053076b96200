"""Reading and generating with the model shared by devices: the same tokens, few exchanges."""

import functools
import re

import jax
import numpy as np
import pytest
from mesh_util import by_name
from util import HEADS, assert_close, lines_in_loops, random_params, random_tokens, small_model

from tvq_t5x import decoding
from tvq_t5x.decoding import GenerationState
from tvq_t5x.partitioning import Partitioner
from tvq_t5x.sampling import SamplingConfig

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 4, reason='XLA_FLAGS is set in the environment, without 4 CPU devices'
)
SAMPLED = SamplingConfig(top_p=0.9)
LENGTHS = np.array([0, 3, 4, 7])
BATCH, PROMPT, NEW = len(LENGTHS), 7, 9
# All divisible by 2, and the window is no multiple of the block.
SIZES = {'vocab_size': 12, 'num_codes': 6, 'value_dim': 8, 'window_len': 6}


class Generation:
  """A program on a data x model mesh that reads a prompt, and one that generates."""

  def __init__(self, mesh, **overrides):
    data, model_parallel = mesh
    model = small_model(**{**SIZES, **overrides})
    self.config, module = model.config, model.module
    partitioner = Partitioner(model_parallel, devices=jax.devices('cpu')[: data * model_parallel])
    partitioner.validate(self.config, BATCH)
    params = jax.tree.map(lambda x: x.sharding, partitioner.abstract_params(model))
    states = GenerationState(
      partitioner.decoder_state_shardings(self.config), partitioner.batch_sharding()
    )
    prompts = random_tokens(self.config, BATCH, PROMPT)

    def read(params):
      state = decoding.start(module, BATCH, start_token=2)
      return decoding.read(module, params, state, prompts, LENGTHS)[0]

    def generate(params, state, rng):
      return decoding.generate(module, params, state, NEW, rng, SAMPLED)

    self.read = partitioner.jit(read, (params,), states)
    self.generate = partitioner.jit(generate, (params, states, None), (None, None, states))
    self.params = jax.device_put(random_params(self.config), params)

  def run(self):
    return self.generate(self.params, self.read(self.params), jax.random.key(0))


@functools.cache
def expected(heads):
  return jax.device_get(Generation((1, 1), **HEADS[heads]).run())


@pytest.mark.parametrize('mesh', [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize('heads', ['gated_single', 'mha'])
def test_tokens_are_the_same_on_every_mesh(heads, mesh):
  tokens, scores, state = Generation(mesh, **HEADS[heads]).run()
  np.testing.assert_array_equal(tokens, expected(heads)[0])
  assert_close((scores, state), expected(heads)[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('heads', ['gated_single', 'mha'])
def test_devices_share_the_state(heads, scan_layers):
  """Of a single head the values, of more the heads."""
  generation = Generation((2, 2), scan_layers=scan_layers, **HEADS[heads])
  for name, x in by_name(generation.read(generation.params).decoder.layers).items():
    parts = 4 if heads == 'mha' or name.endswith(('values', 'means')) else 2
    assert x.size == parts * x.addressable_shards[0].data.size, name


@pytest.mark.parametrize('heads', ['gated_single', 'mha'])
def test_a_token_takes_one_exchange_a_sublayer_and_two_more(heads):
  """For the embedding and the logits: devices wait for each of them."""
  generation = Generation((1, 2), scan_layers=False, **HEADS[heads])
  state = generation.read(generation.params)
  lowered = generation.generate.lower(generation.params, state, jax.random.key(0))
  exchange = r' (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\('
  lines = lines_in_loops(lowered.compile().as_text())
  found = [line for line in lines if re.search(exchange, line)]
  sublayers = generation.config.num_layers * (generation.config.num_attention_sublayers)
  sublayers += generation.config.num_layers * (heads == 'mha')  # An MLP each.
  assert len(found) == sublayers + 2, found
