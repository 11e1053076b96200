"""Times sampling at growing positions of a stream, beside the quadratic baseline with a KV cache.

VQ attention reads tokens up to each position and then samples with `decoding.generate`; the
baseline starts with a cache of random keys and values, which takes as long. All programs run in one
process, one call of each in turn, so that a machine whose speed drifts slows all of them alike.
Memory is that of parameters and state.

  python benchmarks/sampling.py --positions=1024,8192,32768,100000 --out_dir=runs/sampling

writes a table, `sampling.json`, `sampling.png` and `.pdf`, without the caches that do not fit into
memory.
"""

import dataclasses
import functools
import pathlib
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

from tvq_t5x.common import machines
from tvq_t5x.network import decoding, sampling
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
    self.bytes = compiled.memory_analysis().argument_size_in_bytes
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


def _module_and_generate(**fields: Any) -> tuple[Transformer, Callable[..., Any]]:
  module = Transformer(sizes.config(scan_layers=False, **fields))
  config = sampling.SamplingConfig(top_p=_TOP_P.value)

  def generate(params, state, rng):
    return decoding.generate(module, params, state, _TOKENS.value, rng, config)

  return module, generate


def _vq_programs(positions: Sequence[int]) -> dict[int, Program]:
  module, generate = _module_and_generate()
  params = _init(module)
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


def _quadratic_program(position: int) -> Program | None:
  """None where caches and their copies would not fit into memory."""
  module, generate = _module_and_generate(
    attention_type='quadratic', kv_cache_len=position + (sizes.ROUNDS.value + 1) * _TOKENS.value
  )
  shapes = jax.eval_shape(lambda: decoding.start(module, sizes.BATCH_SIZE.value))
  if 3 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) > sizes.free_bytes():
    return None
  state = jax.jit(lambda: decoding.start(module, sizes.BATCH_SIZE.value))()
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
  decoder = state.decoder._replace(
    position=jnp.full_like(state.decoder.position, position),
    layers=jax.tree.map(
      lambda x: jax.random.normal(next(keys), x.shape, x.dtype), state.decoder.layers
    ),
  )
  return Program(generate, _init(module), state._replace(decoder=decoder))


def _print_table(results: Sequence[Result]) -> None:
  print('| tokens before | attention | tokens/s | of quadratic | memory, MB |')
  print('| ---: | --- | ---: | ---: | ---: |')
  baseline = {r.position: r.tokens_per_second for r in results if r.variant == _QUADRATIC}
  for r in results:
    other = baseline.get(r.position)
    ratio = f'{r.tokens_per_second / other:.2f}x' if other else ''
    speed = f'{r.tokens_per_second:,.0f}'
    print(f'| {r.position:,} | {r.variant} | {speed} | {ratio} | {r.bytes / 1e6:,.0f} |')


def _panels(results: Sequence[Result]) -> dict[str, dict[str, Line]]:
  speed, memory = {}, {}
  for variant in (_VQ, _QUADRATIC):
    rows = [r for r in results if r.variant == variant]
    positions = [r.position for r in rows]
    name = report.name_of(variant)
    speed[name] = Line(positions, [r.tokens_per_second for r in rows])
    memory[name] = Line(positions, [r.bytes / 1e6 for r in rows])
  return {'sampling, tokens/s': speed, 'memory, MB': memory}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  positions = sorted(map(int, _POSITIONS.value))
  programs = {(position, _VQ): p for position, p in _vq_programs(positions).items()}
  baselines = {position: _quadratic_program(position) for position in positions}
  programs |= {(position, _QUADRATIC): p for position, p in baselines.items() if p}
  results = {key: Result(key[1], key[0], program.bytes) for key, program in programs.items()}
  for _ in range(sizes.ROUNDS.value):
    for key, program in programs.items():
      results[key].seconds.append(program.run())
  kinds = [(position, variant) for position in positions for variant in (_VQ, _QUADRATIC)]
  results = [results[kind] for kind in kinds if kind in results]
  _print_table(results)
  report.write(_OUT.value, 'sampling', argv[0], results)
  path = pathlib.Path(_OUT.value, 'sampling.png')
  rounds = sizes.ROUNDS.value
  caption = f'Sampling, {sizes.described()}; medians of {rounds}; {machines.name()}'
  report.plot(path, 'tokens before', _panels(results), caption)


if __name__ == '__main__':
  app.run(main)
