"""Reading and generating against the full forward function."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import (
  HEADS,
  LIGHT,
  assert_close,
  cases,
  lines_in_loops,
  random_params,
  random_tokens,
  small_config,
)

from tvq_t5x.network import decoding
from tvq_t5x.network.longvq.longvq import LongVQ
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import Transformer, batch_axes

GREEDY = SamplingConfig(temperature=0)
# Around the edges of blocks of 4 and of windows of 3 and 6.
LENGTHS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13])
ROWS, P = len(LENGTHS), 13


def started(module, batch_size):
  """The state after token 2 alone."""
  return decoding.start(module, batch_size)._replace(token=jnp.full([batch_size], 2, jnp.int32))


class Decoder:
  """The functions under test, compiled for one network."""

  def __init__(self, **overrides):
    self.config = small_config(**overrides)
    self.module = Transformer(self.config)
    self.params = random_params(self.config)
    self.read = jax.jit(functools.partial(decoding.read, self.module, self.params))
    self.generate = jax.jit(
      functools.partial(decoding.generate, self.module, self.params), static_argnums=(1, 3)
    )

  def start(self, batch_size=ROWS):
    return started(self.module, batch_size)

  def logprobs(self, rows):
    """Log-probabilities of what follows the start token and each prefix of equally long rows."""
    inputs = np.concatenate([np.full([len(rows), 1], 2), rows], axis=1)
    padding = -inputs.shape[1] % self.config.block_len
    inputs = np.pad(inputs, [(0, 0), (0, padding)], constant_values=1)
    logits = jax.jit(self.module.apply)({'params': self.params}, inputs)[0]
    return np.asarray(jax.nn.log_softmax(logits))[:, : rows.shape[1] + 1]


def join(prompts, lengths, generated):
  """Rows of prompt and generated tokens, padded with 1 where nothing depends on it."""
  size = prompts.shape[1] + generated.shape[1]
  rows = np.ones([len(prompts), size], np.int32)
  for row, prompt, n, new in zip(rows, prompts, lengths, generated, strict=True):
    row[: n + len(new)] = [*prompt[:n], *new]
  return rows


CASES = {
  **{
    f'{name}_{scan}': {**heads, 'scan_layers': scan}
    for name, heads in HEADS.items()
    for scan in (True, False)
  },
  'short_window': {'window_len': 3, **LIGHT},
  'window_of_one': {'window_len': 1, **LIGHT},
  'no_cache': {'compressed_cache': False, **LIGHT},
  'quadratic': {'attention_type': 'quadratic', 'kv_cache_len': 40, 'head_type': 'gated'},
  'quadratic_mqa': {'attention_type': 'quadratic', 'kv_cache_len': 40, **HEADS['mqa']},
  'longvq': {'sublayers': ('longvq', 'mlp'), 'num_heads': 2},
  'longvq_in_a_hybrid': {'sublayers': (LongVQ, 'vq'), 'scan_layers': False},
  'hybrid': {'sublayers': ('quadratic', 'vq', 'mlp'), 'kv_cache_len': 40},
  'serial': {'reduction': 'serial', 'tied_embeddings': True, 'final_norm': True, **LIGHT},
}
# Much as others are.
_VARIANTS = {f'{name}_False' for name in HEADS} | {'gated_multi_True', 'longvq'}


@pytest.mark.parametrize('overrides', cases(CASES, slow=_VARIANTS))
def test_greedy_choice_is_the_likeliest_token_of_the_full_forward(overrides):
  d = Decoder(**{'window_len': 6, 'absolute_positions': True, **overrides})
  prompts = np.asarray(random_tokens(d.config, len(LENGTHS), P))
  state, total, nats = d.read(d.start(), prompts, LENGTHS)
  tokens, scores, after = d.generate(state, 15, jax.random.key(0), GREEDY)

  rows = join(prompts, LENGTHS, np.asarray(tokens))
  logprobs = d.logprobs(rows)
  expected = np.zeros([len(rows), P], np.float32)
  for b, n in enumerate(LENGTHS):
    expected[b, :n] = -logprobs[b, np.arange(n), prompts[b, :n]]
    np.testing.assert_array_equal(tokens[b], logprobs[b, n : n + 15].argmax(axis=-1))
    assert_close(scores[b], logprobs[b, n : n + 15].max(axis=-1), atol=1e-4)
  assert_close(nats, expected, atol=1e-4)
  assert_close(total, -expected.sum(axis=1), atol=1e-4)
  np.testing.assert_array_equal(after.decoder.position, LENGTHS + 15)

  # The state is that of reading what was generated.
  again = d.read(state, tokens, np.full(len(LENGTHS), 15))[0]
  assert_close(after, again, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope='module')
def decoder():
  d = Decoder(window_len=6, **LIGHT)
  prompts = np.asarray(random_tokens(d.config, len(LENGTHS), P))
  return d, prompts, d.read(d.start(), prompts, LENGTHS)[0]


def test_reading_in_pieces_is_reading_the_whole(decoder):
  d, prompts, whole = decoder
  state, parts = d.start(), []
  for first, last in ((0, 5), (5, 6), (6, 6), (6, 13)):
    lengths = np.clip(LENGTHS - first, 0, last - first)
    state, _, nats = d.read(state, prompts[:, first:last], lengths)
    parts.append(nats)
  assert_close(state, whole, atol=1e-5)
  assert_close(jnp.concatenate(parts, axis=1), d.read(d.start(), prompts, LENGTHS)[2], atol=1e-5)


# One of each kind of sublayer, and of each kind of heads.
_KINDS = ('gated_single_False', 'mha_True', 'quadratic_mqa', 'longvq_in_a_hybrid', 'hybrid')


@pytest.mark.parametrize('kind', _KINDS)
def test_a_row_is_as_it_is_alone(kind):
  """Whatever the batch, and how far the longest row makes it go: to rounding.

  Where rounding makes another code the nearest one, of two that are equally near, nats differ by
  thousandths; of keys that are not equally near two codes, as here, it makes none.
  """
  d = Decoder(**{'window_len': 6, 'absolute_positions': True, **CASES[kind]})
  prompts = np.asarray(random_tokens(d.config, ROWS, P))
  state, total, nats = d.read(d.start(), prompts, LENGTHS)
  axes = decoding.GenerationState(batch_axes(d.config), 0)
  block = d.config.block_len
  for b, n in enumerate(LENGTHS):
    row = prompts[b : b + 1, : block if n <= block else P]  # One block is another program.
    alone, alone_total, alone_nats = d.read(d.start(1), row, np.array([n]))
    assert_close(nats[b, :n], alone_nats[0, :n], atol=1e-5)
    assert_close(total[b], alone_total[0], atol=1e-5 * max(n, 1))
    row = jax.tree.map(lambda x, axis, b=b: jnp.take(x, jnp.array([b]), axis), state, axes)
    assert_close(row, alone, atol=1e-5)


def test_tokens_beyond_a_row_s_length_are_ignored(decoder):
  d, prompts, expected = decoder
  changed = np.where(np.arange(P) < LENGTHS[:, None], prompts, 7)
  assert_close(d.read(d.start(), changed, LENGTHS)[0], expected, atol=0, rtol=0)


SAMPLED = SamplingConfig(temperature=1.2, top_p=0.9, top_k=8)


@pytest.mark.quick
def test_generating_in_pieces_is_generating_the_whole(decoder):
  d, _, state = decoder
  key = jax.random.key(3)
  tokens, scores, whole = d.generate(state, 17, key, SAMPLED)
  parts = []
  for n in (1, 6, 10):
    *part, state = d.generate(state, n, key, SAMPLED)
    parts.append(part)
  np.testing.assert_array_equal(np.concatenate([t for t, _ in parts], axis=1), tokens)
  assert_close(jnp.concatenate([s for _, s in parts], axis=1), scores)
  assert_close(state, whole)


def test_samples_depend_on_the_key_and_the_row_and_no_other_row(decoder):
  d, _, _ = decoder
  state = d.start(6)
  tokens, scores, _ = d.generate(state, 20, jax.random.key(0), SAMPLED)
  assert len({tuple(row) for row in np.asarray(tokens)}) == 6
  other = d.generate(state, 20, jax.random.key(1), SAMPLED)[0]
  assert np.mean(np.asarray(tokens) == other) < 0.5
  # The scores are those of the model, whatever the choice was made from.
  logprobs = d.logprobs(np.asarray(tokens))[:, :-1]
  expected = np.take_along_axis(logprobs, np.asarray(tokens)[..., None], axis=-1)[..., 0]
  assert_close(scores, expected, atol=1e-4)
  # Other sequences in the other rows.
  read = d.read(state, random_tokens(d.config, 6, 5), np.array([5, 0, 3, 0, 5, 5]))[0]
  beside = d.generate(read, 20, jax.random.key(0), SAMPLED)[0]
  np.testing.assert_array_equal(beside[np.array([1, 3])], tokens[np.array([1, 3])])


def test_frequencies_of_first_tokens(decoder):
  """Positions and rows have independent noise: together they follow the model's distribution."""
  d, _, _ = decoder
  n = 3000
  tokens = d.generate(d.start(n), 1, jax.random.key(0), SamplingConfig())[0][:, 0]
  expected = np.exp(d.logprobs(np.zeros([1, 0], np.int32))[0, 0])
  ours = np.bincount(tokens, minlength=d.config.vocab_size) / n
  np.testing.assert_array_less(
    np.abs(ours - expected), 5 * np.sqrt(expected * (1 - expected) / n) + 1e-6
  )


def test_stopping_early(decoder):
  d, _, state = decoder
  run = jax.jit(
    lambda count: decoding.generate(
      d.module, d.params, state, 17, jax.random.key(0), SAMPLED, count=count
    )
  )
  tokens, scores, after = run(9)
  expected = d.generate(state, 9, jax.random.key(0), SAMPLED)
  assert_close((tokens[:, :9], scores[:, :9], after), expected)
  assert not np.any(tokens[:, 9:])


def test_repeated_sequences_go_on_alike():
  for scan in (True, False):
    d = Decoder(head_type='mha', num_layers=2, scan_layers=scan)
    state = d.read(d.start(2), random_tokens(d.config, 2, 5), np.array([5, 2]))[0]
    tokens = d.generate(state, 6, jax.random.key(0), GREEDY)[0]
    repeated = d.generate(decoding.repeat(d.module, state, 3), 6, jax.random.key(0), GREEDY)[0]
    np.testing.assert_array_equal(repeated, np.repeat(tokens, 3, axis=0))


def test_bfloat16_is_close():
  d = Decoder(window_len=6, dtype='bfloat16', **LIGHT)
  prompts = np.asarray(random_tokens(d.config, 3, P))
  state, _, _ = d.read(d.start(3), prompts, np.array([0, 5, 13]))
  tokens, scores, after = d.generate(state, 12, jax.random.key(0), SAMPLED)
  sublayer = after.decoder.layers[0][0]
  assert sublayer.values.dtype == jnp.bfloat16
  assert sublayer.cache.means.dtype == jnp.float32
  logprobs = d.logprobs(join(prompts, [0, 5, 13], np.asarray(tokens)))
  for b, n in enumerate([0, 5, 13]):
    expected = logprobs[b, np.arange(n, n + 12), np.asarray(tokens[b])]
    assert_close(scores[b], expected.astype(np.float32), atol=0.15, rtol=0.05)


def copied_in_loops(program, size):
  """Lines of a compiled program, within its loops, that copy arrays of at least this size."""
  lines = lines_in_loops(program)
  found = [(line, re.search(r'= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(', line)) for line in lines]
  return [line for line, m in found if m and math.prod(map(int, m[1].split(','))) >= size]


IN_PLACE = {
  'scanned': HEADS['gated_single'],
  'gated_single': {**HEADS['gated_single'], 'scan_layers': False},
  'mha': {**HEADS['mha'], 'scan_layers': False},
  'quadratic': {'attention_type': 'quadratic', 'kv_cache_len': 512, **LIGHT},
}


@pytest.mark.parametrize('overrides', cases(IN_PLACE, slow={'mha'}))
def test_state_is_updated_in_place(overrides):
  """Else each token would copy all of it."""
  sizes = {'window_len': 512, 'num_codes': 256, 'value_dim': 64}
  d = Decoder(**sizes, **overrides)
  scan_layers = d.config.scan_layers
  module, params = (d.module, d.params)
  if scan_layers:
    module, params = decoding.unscanned(module, params)
  state = started(module, 2)

  def run(params, state):
    return decoding.generate(module, params, state, 9, jax.random.key(0), SAMPLED)

  compiled = jax.jit(run, donate_argnums=1).lower(params, state).compile()
  # The cache of VQ attention is half as large as its window.
  size = state.decoder.layers[0][0].values.size // 2
  assert not copied_in_loops(compiled.as_text(), size)
  # And the layers of a scanned network are those of one that isn't.
  expected = d.generate(d.start(2), 9, jax.random.key(0), SAMPLED)[0]
  np.testing.assert_array_equal(compiled(params, state)[0], expected)


@pytest.mark.slow
def test_windows_are_not_copied_for_a_token_on_tpu(tpus):
  """Sizes of a real network: XLA leaves windows in place in small ones, whatever reads them."""
  config = small_config(
    emb_dim=768,
    key_dim=128,
    value_dim=1536,
    num_layers=4,
    num_codes=512,
    block_len=512,
    window_len=512,
    vocab_size=256,
    dtype='bfloat16',
  )
  module, batch_size = Transformer(config), 64
  devices = np.array(tpus('v5e:1x1')[:1]).reshape(1, 1)
  args = jax.eval_shape(
    lambda: (random_params(config), decoding.start(module, batch_size), jax.random.key(0))
  )
  sharding = jax.sharding.SingleDeviceSharding(devices[0, 0])
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)

  @jax.jit
  def run(params, state, rng):
    return decoding.generate(module, params, state, 1024, rng, SAMPLED)

  with jax.set_mesh(jax.sharding.Mesh(devices, ('data', 'model'))):
    program = run.lower(*args).compile().as_text()
  size = batch_size * config.window_len * config.value_dim
  # Those that are a fusion of their own are in the loop that puts a window in order.
  copies = [x for x in copied_in_loops(program, size) if 'ROOT' not in x]
  assert len(copies) < config.num_layers, copies
