"""Training on, and evaluation of, one long sequence on one device: speed and memory by length.

A training step is one exact gradient through all of the sequence, computed in segments of
`--segment_len` tokens (SEGMENT_LEN). Each measurement is a process of its own, whose peak resident
memory is shown; compiling is not in the time, but in the memory.

  python benchmarks/long_context.py --lengths=8192,32768,131072,262144,524288,1048576

writes a table, `long_context.json`, `long_context.png` and `.pdf`.
"""

import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import report
import seqio
import sizes
from absl import app, flags
from report import Line

from tvq_t5x.common import machines
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import compilation, eval_step, models, optimizers, placement
from tvq_t5x.training.partitioning import Partitioner

_LENGTHS = flags.DEFINE_list(
  'lengths', ['8192', '32768', '131072', '262144', '524288', '1048576'], 'Sequence lengths T.'
)
_SEGMENT_LEN = flags.DEFINE_integer('segment_len', 4096, 'Tokens that are held at once.')
_REMAT = flags.DEFINE_enum('remat', 'none', ['none', 'attention', 'layer'], 'Within a segment.')
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Calls are repeated for so long; medians are shown.')
_OUT = flags.DEFINE_string('out_dir', 'runs/long_context', 'Where table and plot go.')
_ONE = flags.DEFINE_string('one', None, 'Measures KIND:T in this process, and prints the result.')
flags.adopt_module_key_flags(sizes)

_KINDS = ('training', 'evaluation')


@dataclasses.dataclass
class Result:
  """Of one process."""

  kind: str
  length: int
  seconds: list[float]  # Of calls.
  peak_bytes: int  # Resident memory of the process.

  @property
  def tokens_per_second(self) -> float:
    return sizes.BATCH_SIZE.value * self.length / statistics.median(self.seconds)


def _model(length: int) -> tuple[models.TransformerVQModel, dict[str, jax.Array]]:
  """The benchmarks' network, and a batch of random tokens."""
  optimizer = optimizers.adamw(4e-4, weight_decay=2e-4, clip_norm=0.1)
  vocabulary = seqio.PassThroughVocabulary(sizes.VOCAB_SIZE)
  config = sizes.config(remat=_REMAT.value)
  shape = sizes.BATCH_SIZE.value, length
  tokens = jax.random.randint(jax.random.key(1), shape, 0, sizes.VOCAB_SIZE, jnp.int32)
  batch = {
    'decoder_input_tokens': tokens,
    'decoder_target_tokens': jnp.roll(tokens, -1, axis=1),
    'decoder_loss_weights': jnp.ones(shape, jnp.float32),
  }
  return models.TransformerVQModel(Transformer(config), vocabulary, optimizer), batch


def _training(length: int) -> Callable[[], Any]:
  model, batch = _model(length)
  partitioner = Partitioner(devices=jax.devices()[:1])
  step = compilation.lower_train_step(
    model,
    partitioner,
    sizes.BATCH_SIZE.value,
    length,
    update_len=length,
    segment_len=min(_SEGMENT_LEN.value, length),
  ).compile()
  state = placement.init_state(partitioner, model, jax.random.key(0))

  def call() -> Any:
    nonlocal state
    state, metrics = step(state, batch, jax.random.key(2))
    return state, metrics

  return call


def _evaluation(length: int) -> Callable[[], Any]:
  model, batch = _model(length)
  partitioner = Partitioner(devices=jax.devices()[:1])
  params = placement.init_state(partitioner, model, jax.random.key(0)).params

  def metrics(params: Any, batch: Any) -> Any:
    return eval_step.batch_metrics(model, params, batch, min(_SEGMENT_LEN.value, length))

  program = jax.jit(metrics).lower(params, batch).compile()
  return lambda: program(params, batch)


def _measure(kind: str, length: int) -> Result:
  """Measures in this process."""
  call = {'training': _training, 'evaluation': _evaluation}[kind](length)
  seconds: list[float] = []
  while not seconds or sum(seconds) < _SECONDS.value:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - begin)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return Result(kind, length, seconds, peak)


def _measure_apart(kind: str, length: int) -> Result:
  """Measures in a process of its own."""
  command = [sys.executable, *sys.argv, f'--one={kind}:{length}']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return Result(**json.loads(done.stdout.splitlines()[-1]))


def _print_table(results: Sequence[Result]) -> None:
  print('| T | | tokens/s | of the shortest | peak memory, GB |')
  print('| ---: | --- | ---: | ---: | ---: |')
  first: dict[str, float] = {}
  for r in results:
    speed = r.tokens_per_second
    ratio = speed / first.setdefault(r.kind, speed)
    print(f'| {r.length:,} | {r.kind} | {speed:,.0f} | {ratio:.2f}x | {r.peak_bytes / 1e9:.2f} |')


def _panels(results: Sequence[Result]) -> dict[str, dict[str, Line]]:
  speed, memory = {}, {}
  for kind in _KINDS:
    rows = [r for r in results if r.kind == kind]
    lengths = [r.length for r in rows]
    speed[kind] = Line(lengths, [r.tokens_per_second for r in rows])
    memory[kind] = Line(lengths, [r.peak_bytes / 1e9 for r in rows])
  return {'tokens/s': speed, 'peak memory, GB': memory}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  if _ONE.value:
    kind, length = _ONE.value.split(':')
    print(json.dumps(dataclasses.asdict(_measure(kind, int(length)))))
    return
  results = [_measure_apart(kind, int(n)) for kind in _KINDS for n in _LENGTHS.value]
  _print_table(results)
  report.write(_OUT.value, 'long_context', argv[0], results)
  path = pathlib.Path(_OUT.value, 'long_context.png')
  caption = (
    f'One sequence, {sizes.described()}, segments of {_SEGMENT_LEN.value}; {machines.name()}'
  )
  report.plot(path, 'sequence length T', _panels(results), caption)


if __name__ == '__main__':
  app.run(main)
