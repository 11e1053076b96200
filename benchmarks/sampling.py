"""Times sampling at growing positions of a stream, beside the quadratic baseline with a KV cache.

VQ attention reads tokens up to each position and then samples with `decoding.generate`; the
baseline starts with a cache of random keys and values, which take as long. All programs run in one
process, one call of each in turn, so that a machine whose speed drifts slows all of them alike.
Memory is the compiler's own figure for one call: arguments (parameters and state), results and
temporaries.

  python benchmarks/sampling.py --positions=1024,8192,32768,100000 --out_dir=runs/sampling

writes a table, `sampling.json` and `sampling.png`.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import report
import sizes
from absl import app, flags
from report import Line

from tvq_t5x.network import decoding, sampling
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import Logits, RMSNorm, rms_normalize
from tvq_t5x.network.positions import sinusoids
from tvq_t5x.network.transformer import Transformer

_POSITIONS = flags.DEFINE_list('positions', ['1024', '8192', '32768', '100000'], 'Tokens before.')
_TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens that one call samples.')
_TOP_P = flags.DEFINE_float('top_p', 0.9, 'Share of the mass to sample from.')
_OUT = flags.DEFINE_string('out_dir', 'runs/sampling', 'Where table and plot go.')
flags.adopt_module_key_flags(sizes)

_VQ, _QUADRATIC = 'vq', 'quadratic, KV cache'
_READ = 4096


@dataclasses.dataclass
class Result:
  """One kind of attention at one position."""

  variant: str
  position: int
  bytes: int
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def tokens_per_second(self) -> float:
    return sizes.BATCH_SIZE.value * _TOKENS.value / statistics.median(self.seconds)


class Program:
  """A compiled call that maps a state to tokens, scores and a new state; and its state."""

  def __init__(self, function: Callable[..., Any], params: Any, state: Any):
    """Compiles it, and runs it once."""
    rng = jax.random.key(2)
    compiled = jax.jit(function, donate_argnums=1).lower(params, state, rng).compile()
    memory = compiled.memory_analysis()
    self.bytes = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    )
    self._call, self._state = functools.partial(compiled, params), state
    self._rng = rng
    # A call moves the state on by a few tokens: the timed ones then begin there.
    self.run()

  def run(self) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    *_, self._state = jax.block_until_ready(self._call(self._state, self._rng))
    return time.perf_counter() - begin


def _init(module: Transformer) -> Any:
  return jax.jit(lambda key: module.init(key, jnp.zeros([1, 1], jnp.int32))['params'])(
    jax.random.key(0)
  )


def _vq_programs(positions: Sequence[int]) -> dict[int, Program]:
  module = Transformer(sizes.config(scan_layers=False))
  params = _init(module)
  config = sampling.SamplingConfig(top_p=_TOP_P.value)

  def generate(params, state, rng):
    return decoding.generate(module, params, state, _TOKENS.value, rng, config)

  read = jax.jit(functools.partial(decoding.read, module, params))
  state = jax.jit(lambda: decoding.start(module, sizes.BATCH_SIZE.value))()
  programs, done = {}, 0
  for position in positions:
    while done < position:
      length = min(_READ, position - done)
      tokens = jax.random.randint(
        jax.random.key(done), (sizes.BATCH_SIZE.value, _READ), 0, sizes.VOCAB_SIZE
      )
      state = read(state, tokens, jnp.full([sizes.BATCH_SIZE.value], length))[0]
      done += length
    programs[position] = Program(generate, params, jax.tree.map(jnp.copy, state))
  return programs


def _quadratic_program(position: int) -> Program:
  c = sizes.config(attention_type='quadratic', scan_layers=False)
  params = _init(Transformer(c))
  slots = position + (sizes.ROUNDS.value + 1) * _TOKENS.value
  keys = iter(jax.random.split(jax.random.key(1), 4 * c.num_layers))

  def cache(width):
    return jax.random.normal(next(keys), (sizes.BATCH_SIZE.value, slots, width), c.dtype)

  caches = [(cache(c.key_dim), cache(c.value_dim)) for _ in range(2 * c.num_layers)]
  token = jnp.ones([sizes.BATCH_SIZE.value], jnp.int32)
  state = jnp.int32(position), token, caches
  return Program(functools.partial(quadratic_generate, c, _TOKENS.value), params, state)


def quadratic_generate(c: TransformerConfig, num_tokens: int, params: Any, state: Any, rng: Any):
  """As `decoding.generate`, for quadratic attention with one gated head.

  Args:
    c: hyperparameters.
    num_tokens: n.
    params: of a Transformer without scanned layers.
    state: how many tokens came before, the last one [B], and for each attention sublayer keys
      [B, P, K] and values [B, P, V], of which the first so many are filled: at least M.
    rng: key.

  Returns:
    Tokens [B, n], their log-likelihoods [B, n] and the new state.
  """
  sublayers = [
    params[f'layers_{i}'][f'attention_{j}'] for i in range(c.num_layers) for j in range(2)
  ]
  waves = sinusoids(jnp.arange(c.window_len + 1), c.emb_dim, c.max_wavelength).astype(c.dtype)
  scale = c.key_dim**-0.25
  distances = [scale * (waves @ p['distance']['kernel'][:, 0].astype(c.dtype)) for p in sublayers]
  config = sampling.SamplingConfig(top_p=_TOP_P.value)

  def attend(p, distances, keys, values, x, position):
    def project(name):
      return y @ p[name]['kernel'][:, 0].astype(c.dtype)

    y = RMSNorm().apply({'params': p['norm']}, x)
    query = scale * rms_normalize(project('query'))
    key = scale * rms_normalize(project('key'))
    value = jax.nn.silu(project('value'))
    content, near = (query + scale * p[f'{name}_bias'] for name in ('content', 'position'))
    nearness = near @ distances.T  # [B, M + 1]
    scores = jnp.einsum('BK,BPK->BP', content, keys, preferred_element_type=jnp.float32)
    window = position - c.window_len
    close = jax.lax.dynamic_slice_in_dim(scores, window, c.window_len, 1) + nearness[:, :0:-1]
    scores = jax.lax.dynamic_update_slice_in_dim(scores, close, window, 1)
    scores = jnp.where(jnp.arange(keys.shape[1]) < position, scores, -1e30)
    own = jnp.sum(content * key, axis=-1) + nearness[:, 0]
    peak = jnp.maximum(jnp.max(scores, axis=-1), own)
    weights, own = jnp.exp(scores - peak[:, None]), jnp.exp(own - peak)[:, None]
    weights, mass = weights.astype(c.dtype), jnp.sum(weights, axis=-1, keepdims=True) + own
    total = jnp.einsum('BP,BPV->BV', weights, values, preferred_element_type=jnp.float32)
    total = total + own * value
    # Written after they are read, or XLA copies the cache for each token.
    key = jnp.where(jnp.isnan(mass), 0, key)
    value = jnp.where(jnp.isnan(total), 0, value)
    keys, values = (
      jax.lax.dynamic_update_slice_in_dim(x, row[:, None].astype(c.dtype), position, 1)
      for x, row in ((keys, key), (values, value))
    )
    out = (total / mass).astype(c.dtype) * jax.nn.silu(project('gate'))
    return x + out @ p['out']['kernel'][0].astype(c.dtype), (keys, values)

  def step(state, noise):
    position, token, caches = state
    x = params['token_embedder']['embedding'][token].astype(c.dtype)
    new = []
    for p, d, (keys, values) in zip(sublayers, distances, caches, strict=True):
      x, cache = attend(p, d, keys, values, x, position)
      new.append(cache)
    logits = Logits(c).apply({'params': params['logits']}, x[:, None], None)[:, 0]
    token = sampling.choose(noise, logits, config)
    score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return (position + 1, token, new), (token, score)

  noise = jax.random.uniform(rng, (num_tokens, len(state[1])))
  state, (tokens, scores) = jax.lax.scan(step, state, noise)
  return tokens.T, scores.T, state


def _print_table(results: Sequence[Result]) -> None:
  print('| tokens before | attention | tokens/s | of quadratic | memory, MB |')
  print('| ---: | --- | ---: | ---: | ---: |')
  baseline = {r.position: r.tokens_per_second for r in results if r.variant == _QUADRATIC}
  for r in results:
    ratio = f'{r.tokens_per_second / baseline[r.position]:.2f}x'
    speed = f'{r.tokens_per_second:,.0f}'
    print(f'| {r.position:,} | {r.variant} | {speed} | {ratio} | {r.bytes / 1e6:,.0f} |')


def _panels(results: Sequence[Result]) -> dict[str, dict[str, Line]]:
  speed, memory = {}, {}
  for variant in (_VQ, _QUADRATIC):
    rows = [r for r in results if r.variant == variant]
    positions = [r.position for r in rows]
    speed[variant] = Line(positions, [r.tokens_per_second for r in rows])
    memory[variant] = Line(positions, [r.bytes / 1e6 for r in rows])
  return {'sampling, tokens/s': speed, 'memory, MB': memory}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  positions = sorted(map(int, _POSITIONS.value))
  programs = {(position, _VQ): p for position, p in _vq_programs(positions).items()}
  programs |= {(position, _QUADRATIC): _quadratic_program(position) for position in positions}
  results = {key: Result(key[1], key[0], program.bytes) for key, program in programs.items()}
  for _ in range(sizes.ROUNDS.value):
    for key, program in programs.items():
      results[key].seconds.append(program.run())
  results = [results[position, variant] for position in positions for variant in (_VQ, _QUADRATIC)]
  _print_table(results)
  report.write(_OUT.value, 'sampling', argv[0], results)
  report.plot(os.path.join(_OUT.value, 'sampling.png'), 'tokens before', _panels(results))


if __name__ == '__main__':
  app.run(main)
