"""ListOps as the Long Range Arena generates it (Tay et al., 2020, arXiv 2011.04006, and its code).

An expression is a digit, or an operator with arguments that are expressions:

    ( ( ( [MAX 2 ) 9 ) ] )

The parentheses hold what belongs together and tell no more than the brackets do; without them it is
`[MAX 2 9 ]`, four symbols long. MIN and MAX are what they say, MED is the median, rounded down, and
SM the sum modulo 10: the value of an expression is a digit.

An expression at depth 1 is drawn so: it is a digit with probability 0.75, and from the largest
depth on with certainty, or else one of the four operators with 2 to `max_args` arguments of the
next depth; digits, operators and numbers of arguments are uniform. Those of other lengths than
wanted are thrown away.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import random
import signal
import statistics
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np

from tvq_t5x.common.errors import ConfigError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
  '[MIN': min,
  '[MAX': max,
  '[MED': lambda values: int(statistics.median(values)),
  '[SM': lambda values: sum(values) % 10,
}
NUM_VALUES = 10
_NAMES = tuple(OPERATORS)
_LEAF = 0.75
# Expressions that a process draws before it hands them over.
_CHUNK = 64
# Rarer lengths than this are not waited for.
_RAREST = 1e-6
# Where there are longer expressions than this, there are enough different ones.
_MANY = 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which expressions are kept; by default as published.

  Attributes:
    min_length: symbols of an expression without parentheses, at least.
    max_length: at most.
    max_depth: of an expression; a digit has depth 1.
    max_args: arguments of an operator at most.
    seed: any whole number.
  """

  min_length: int = 501
  max_length: int = 1999
  max_depth: int = 10
  max_args: int = 10
  seed: int = 0


class Expression(NamedTuple):
  """An expression.

  Attributes:
    text: with parentheses.
    length: symbols without parentheses.
    value: a digit.
  """

  text: str
  length: int
  value: int


def check(settings: Settings, number: int) -> None:
  """Refuses settings for which there are not enough different expressions, or hardly any.

  Args:
    settings: of the expressions.
    number: of different expressions that are wanted.

  Raises:
    ConfigError: which says how many there are.
  """
  s = settings
  which = (
    f'expressions of {s.min_length} to {s.max_length} symbols, not deeper than {s.max_depth} and '
    f'with at most {s.max_args} arguments'
  )
  shares = length_distribution(s)
  share = shares[s.min_length :].sum()
  count = _numbers(s, min(s.max_length, _MANY))[s.min_length :].sum()
  if shares[_MANY + 1 :].sum() > _RAREST**2:
    count = np.inf
  if share < _RAREST:
    raise ConfigError(
      f'there are hardly any {which}: less than one in {1 / _RAREST:,.0f} that are drawn; give '
      'other lengths, a larger depth or more arguments.'
    )
  if number > count / 2:
    raise ConfigError(
      f'{number:,} different {which} are too many of the {count:,.0f} that there are: give at most '
      f'half of them, or a larger length.'
    )


def length_distribution(settings: Settings) -> np.ndarray:
  """Probabilities of the lengths 0 to `max_length` of what is drawn, [max_length + 1] float64.

  What is longer has the rest. The lengths of a node's arguments are independent.
  """
  size = settings.max_length + 1
  leaf = np.zeros(size)
  leaf[1:2] = 1
  found = leaf

  def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(a, 2 * size) * np.fft.rfft(b, 2 * size), 2 * size)[:size]

  for _ in range(settings.max_depth - 1):
    nodes = _nodes(found, settings.max_args, times) / (settings.max_args - 1)
    found = _LEAF * leaf + (1 - _LEAF) * np.maximum(nodes, 0)
  return found


def _numbers(settings: Settings, max_length: int) -> np.ndarray:
  """How many expressions there are of the lengths 0 to `max_length`, [max_length + 1] float64."""
  size = max_length + 1
  leaves = np.zeros(size)
  leaves[1:2] = NUM_VALUES
  found = leaves

  def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(np.convolve(a, b)[:size], 1e100)

  for _ in range(settings.max_depth - 1):
    found = leaves + len(OPERATORS) * _nodes(found, settings.max_args, times)
  return found


def _nodes(args: np.ndarray, max_args: int, times: Callable) -> np.ndarray:
  """By length, from that of an argument: a sum over the numbers of arguments."""
  power, total = args, np.zeros_like(args)
  for _ in range(2, max_args + 1):
    power = times(power, args)
    total = total + power
  return np.concatenate([[0, 0], total])[: len(args)]  # Operator and closing bracket.


def expressions(settings: Settings, num_processes: int = 1) -> Generator[Expression, None, None]:
  """Different expressions, without end; they don't depend on the number of processes.

  Args:
    settings: that `check` accepts for as many as are read.
    num_processes: that draw them; with 1, this one does.
  """
  seen = set()
  with contextlib.closing(_chunks(settings, num_processes)) as chunks:
    for expression in itertools.chain.from_iterable(chunks):
      key = hashlib.blake2b(expression.text.encode(), digest_size=16).digest()
      if key not in seen:
        seen.add(key)
        yield expression


def _chunks(settings: Settings, num_processes: int) -> Generator[list[Expression], None, None]:
  if num_processes == 1:
    for i in itertools.count():
      yield _chunk(settings, i)
  # Threads of the process that asks don't survive a fork.
  pool = concurrent.futures.ProcessPoolExecutor(num_processes, multiprocessing.get_context('spawn'))
  # Processes are started by a thread, which no signal interrupts halfway, and without the signals
  # that end this one: it ends them.
  starter = concurrent.futures.ThreadPoolExecutor(
    1,
    initializer=signal.pthread_sigmask,
    initargs=(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}),
  )
  try:
    submitted = (starter.submit(pool.submit, _chunk, settings, i) for i in itertools.count())
    ahead = deque(itertools.islice(submitted, 2 * num_processes))
    while True:
      yield ahead.popleft().result().result()
      ahead.append(next(submitted))
  finally:
    starter.shutdown(wait=True, cancel_futures=True)
    pool.shutdown(wait=True, cancel_futures=True)


def _chunk(settings: Settings, number: int) -> list[Expression]:
  """The expressions of a chunk, which follow from its number and the seed."""
  draw = random.Random(f'{settings.seed}/{number}').random  # The same in any version of Python.
  found = []
  while len(found) < _CHUNK:
    expression = _drawn(draw, settings, 1, settings.max_length)
    if expression is not None and expression.length >= settings.min_length:
      found.append(expression)
  return found


def _drawn(
  draw: Callable[[], float], settings: Settings, depth: int, max_length: int
) -> Expression | None:
  """An expression at a depth; None as soon as it is longer than `max_length`."""
  if max_length < 1:
    return None
  if depth == settings.max_depth or draw() < _LEAF:
    value = int(draw() * NUM_VALUES)
    return Expression(str(value), 1, value)
  length, args = 2, []
  for _ in range(2 + int(draw() * (settings.max_args - 1))):
    arg = _drawn(draw, settings, depth + 1, max_length - length)
    if arg is None:
      return None
    length += arg.length
    args.append(arg)
  name = _NAMES[int(draw() * len(_NAMES))]
  inner = ''.join(f' {arg.text} )' for arg in args)
  text = f'{"( " * (len(args) + 1)}{name}{inner} ] )'
  return Expression(text, length, OPERATORS[name]([arg.value for arg in args]))
