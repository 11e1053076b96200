"""Times a training step of VQ attention, by reduction, beside the quadratic baseline.

All variants run in one process, one step of each in turn, so that a machine whose speed drifts
slows all of them alike. Peak memory is the compiler's own figure for the step's temporaries.

  python benchmarks/throughput.py --lengths=2048,4096,8192,16384,32768 --out_dir=runs/throughput

writes a table, `throughput.json`, `throughput.png` and `.pdf`. A variant that would not fit into
memory is compiled, but not run.
"""

import ctypes
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import report
import seqio
import sizes
from absl import app, flags
from report import Line

from tvq_t5x.common import machines
from tvq_t5x.network.config import AttentionType
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import compilation, models, optimizers, placement
from tvq_t5x.training.partitioning import Partitioner

_LENGTHS = flags.DEFINE_list('lengths', ['2048', '4096', '8192'], 'Sequence lengths T.')
_VARIANTS = flags.DEFINE_list(
  'variants', ['serial', 'matmul', 'associative', 'quadratic'], 'Reductions, or `quadratic`.'
)
_REMAT = flags.DEFINE_enum('remat', 'attention', ['none', 'attention', 'layer'], 'See config.py.')
_OUT = flags.DEFINE_string('out_dir', 'runs/throughput', 'Where table and plot go.')
flags.adopt_module_key_flags(sizes)

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@dataclasses.dataclass
class Result:
  """One variant at one length."""

  variant: str
  length: int
  temp_bytes: int
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def tokens_per_second(self) -> float | None:
    """Median; None where the variant was not run."""
    if not self.seconds:
      return None
    return sizes.BATCH_SIZE.value * self.length / statistics.median(self.seconds)


class Step:
  """A compiled training step with its own parameters."""

  def __init__(self, variant: str, length: int):
    """Compiles the step."""
    kind = (
      {'attention_type': variant} if variant == AttentionType.QUADRATIC else {'reduction': variant}
    )
    config = sizes.config(remat=_REMAT.value, **kind)
    optimizer = optimizers.adamw(4e-4, weight_decay=2e-4, clip_norm=0.1)
    vocabulary = seqio.PassThroughVocabulary(sizes.VOCAB_SIZE)
    self._model = models.TransformerVQModel(Transformer(config), vocabulary, optimizer)
    self._partitioner = Partitioner(devices=jax.devices()[:1])
    tokens = jax.random.randint(
      jax.random.key(1), (sizes.BATCH_SIZE.value, length), 0, sizes.VOCAB_SIZE, jnp.int32
    )
    self._batch = {
      'decoder_input_tokens': tokens,
      'decoder_target_tokens': jnp.roll(tokens, -1, axis=1),
      'decoder_loss_weights': jnp.ones(tokens.shape, jnp.float32),
    }
    lowered = compilation.lower_train_step(
      self._model, self._partitioner, sizes.BATCH_SIZE.value, length, update_len=length
    )
    self._step = lowered.compile()
    self.temp_bytes = self._step.memory_analysis().temp_size_in_bytes

  def start(self) -> None:
    """Creates the parameters and runs one step that is not timed."""
    self._state = placement.init_state(self._partitioner, self._model, jax.random.key(0))
    self.run()

  def run(self) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    self._state, metrics = self._step(self._state, self._batch, jax.random.key(2))
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - begin


def _measure(length: int, variants: Sequence[str]) -> Iterator[Result]:
  steps = {variant: Step(variant, length) for variant in variants}
  results = {v: Result(v, length, step.temp_bytes) for v, step in steps.items()}
  fitting = {v: step for v, step in steps.items() if step.temp_bytes < 0.8 * sizes.free_bytes()}
  for step in fitting.values():
    step.start()
  for _ in range(sizes.ROUNDS.value):
    for variant, step in fitting.items():
      results[variant].seconds.append(step.run())
  yield from results.values()


def _print_table(results: Sequence[Result]) -> None:
  print('| T | attention | tokens/s | of quadratic | temporaries, GB |')
  print('| ---: | --- | ---: | ---: | ---: |')
  baseline = {r.length: r for r in results if r.variant == AttentionType.QUADRATIC}
  for r in results:
    speed, other = r.tokens_per_second, baseline.get(r.length)
    ratio = (
      ''
      if not speed or not other or not other.seconds
      else (f'{speed / other.tokens_per_second:.2f}x')
    )
    shown = f'{speed:,.0f}' if speed else 'does not fit'
    print(f'| {r.length} | {r.variant} | {shown} | {ratio} | {r.temp_bytes / 1e9:.2f} |')


def _panels(results: Sequence[Result]) -> dict[str, dict[str, Line]]:
  speed, memory = {}, {}
  for variant in dict.fromkeys(r.variant for r in results):
    rows = [r for r in results if r.variant == variant]
    run = [r for r in rows if r.seconds]
    name = report.name_of(variant)
    speed[name] = Line([r.length for r in run], [r.tokens_per_second for r in run])
    memory[name] = Line([r.length for r in rows], [r.temp_bytes / 1e9 for r in rows])
  return {'training, tokens/s': speed, "step's temporaries, GB": memory}


def _keep_memory() -> None:
  """Lets the C library keep what is freed, as the allocators of GPUs and TPUs do.

  On CPU, XLA allocates the temporaries of each call anew. At T = 32768, up to a fifth of the time
  would go into gigabytes of new pages.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # Another C library than glibc.
    return
  for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
    mallopt(parameter, value)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  _keep_memory()
  results = []
  for length in map(int, _LENGTHS.value):
    results.extend(_measure(length, [str(v) for v in _VARIANTS.value]))
    jax.clear_caches()
  _print_table(results)
  report.write(_OUT.value, 'throughput', argv[0], results)
  path = pathlib.Path(_OUT.value, 'throughput.png')
  rounds = sizes.ROUNDS.value
  caption = f'A training step, {sizes.described()}; medians of {rounds}; {machines.name()}'
  report.plot(path, 'sequence length T', _panels(results), caption)


if __name__ == '__main__':
  app.run(main)
