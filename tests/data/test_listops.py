"""Generated ListOps: values by an evaluator of the text, and the published distribution."""

import collections
import itertools
import random
import statistics

import numpy as np
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import listops

SMALL = listops.Settings(min_length=20, max_length=100, max_depth=6, max_args=5)


def evaluate(text):
  """The value of an expression in text, by its brackets."""
  stack = [[]]
  for symbol in text.split():
    if symbol.startswith('['):
      stack.append([symbol])
    elif symbol == ']':
      name, *args = stack.pop()
      functions = {'[MIN': min, '[MAX': max, '[MED': np.median, '[SM': lambda x: sum(x) % 10}
      stack[-1].append(int(functions[name](args)))
    elif symbol not in '()':
      stack[-1].append(int(symbol))
  ((value,),) = stack
  return value


def published(rng, depth, s):
  """A tree as the benchmark's own code nests it: (((op, a), b), end)."""
  if depth == s.max_depth or rng.random() > 0.25:
    return rng.randrange(10)
  args = [published(rng, depth + 1, s) for _ in range(rng.randint(2, s.max_args))]
  tree = rng.choice(['[MIN', '[MAX', '[MED', '[SM'])
  for arg in [*args, ']']:
    tree = (tree, arg)
  return tree


def published_text(tree):
  if not isinstance(tree, tuple):
    return str(tree)
  return f'( {published_text(tree[0])} {published_text(tree[1])} )'


def symbols(text):
  return [symbol for symbol in text.split() if symbol not in '()']


def texts_as_published(s, number):
  rng, found = random.Random(1), []
  while len(found) < number:
    text = published_text(published(rng, 1, s))
    if s.min_length <= len(symbols(text)) <= s.max_length:
      found.append(text)
  return found


@pytest.fixture(scope='module')
def drawn():
  return list(itertools.islice(listops.expressions(SMALL), 4000))


def test_values_and_lengths(drawn):
  for expression in drawn:
    assert expression.value == evaluate(expression.text)
    assert expression.length == len(symbols(expression.text))
    assert SMALL.min_length <= expression.length <= SMALL.max_length
  assert len({expression.text for expression in drawn}) == len(drawn)


def test_the_notation():
  assert evaluate('( ( ( [MAX 2 ) 9 ) ] )') == 9
  s = listops.Settings(min_length=4, max_length=4)
  for expression in itertools.islice(listops.expressions(s), 50):
    name, a, b, _ = symbols(expression.text)
    assert expression.text == f'( ( ( {name} {a} ) {b} ) ] )'


def statistics_of(texts):
  """Means with their standard errors: lengths, digits, operators, depth, classes."""
  rows = []
  for text in texts:
    found = symbols(text)
    depth = max(itertools.accumulate(x.startswith('[') - (x == ']') for x in found))
    counts = collections.Counter(found)
    operators = [counts[name] for name in listops.OPERATORS]
    value = evaluate(text)
    digits = sum(counts[str(i)] for i in range(10))
    lengths = [len(found) > n for n in (25, 40, 60, 80)]
    rows.append(
      [len(found), digits / len(found), *operators, depth, *lengths, *(value == np.arange(10))]
    )
  rows = np.asarray(rows, float)
  return rows.mean(0), rows.std(0) / np.sqrt(len(rows))


def test_the_distribution_is_that_of_the_published_code(drawn):
  mean, error = statistics_of(e.text for e in drawn)
  expected, expected_error = statistics_of(texts_as_published(SMALL, 4000))
  assert np.all(np.abs(mean - expected) < 4.5 * np.hypot(error, expected_error) + 1e-9)


def test_lengths_are_distributed_as_computed(drawn):
  share = listops.length_distribution(SMALL)[SMALL.min_length :]
  share /= share.sum()
  found = np.bincount([e.length for e in drawn], minlength=SMALL.max_length + 1)
  found = found[SMALL.min_length :] / len(drawn)
  assert np.all(np.abs(found - share) < 4.5 * np.sqrt(share / len(drawn)) + 1e-9)


def test_the_published_settings():
  """Accepted are 8% of what is drawn; three of four are digits."""
  s = listops.Settings()
  assert (s.min_length, s.max_length, s.max_depth, s.max_args) == (501, 1999, 10, 10)
  listops.check(s, 100_000)
  assert listops.length_distribution(s)[1] == pytest.approx(0.75)
  found = list(itertools.islice(listops.expressions(s), 64))
  assert {evaluate(e.text) == e.value and 500 < e.length < 2000 for e in found} == {True}


@pytest.mark.parametrize('seed', [1, -1])
def test_seeds_differ(seed):
  def first(seed):
    s = listops.Settings(min_length=20, max_length=100, seed=seed)
    return next(listops.expressions(s)).text

  assert first(seed) != first(0) and first(seed) == first(seed)


def test_repetitions_are_left_out():
  s = listops.Settings(min_length=1, max_length=4, seed=3)  # 10 digits, 400 expressions.
  listops.check(s, 205)
  found = [e.text for e in itertools.islice(listops.expressions(s), 205)]
  assert len(set(found)) == 205


@pytest.mark.parametrize(
  ('settings', 'number', 'words'),
  [
    ({'min_length': 2, 'max_length': 3}, 1, 'hardly any expressions of 2 to 3 symbols'),
    ({'max_depth': 2}, 1, 'hardly any .* larger depth'),
    ({'max_depth': 1, 'min_length': 1}, 6, '6 different .* 10 that there are'),
    ({'min_length': 1, 'max_length': 4}, 206, '206 different .* 410 that there are'),
    ({'min_length': 5, 'max_length': 6, 'max_args': 2}, 1, 'hardly any .* more arguments'),
    ({'min_length': 1000, 'max_length': 1300, 'max_depth': 4}, 1, 'less than one in 1,000,000'),
  ],
)
def test_what_can_not_be_had_is_refused(settings, number, words):
  with pytest.raises(ConfigError, match=words):
    listops.check(listops.Settings(**settings), number)


def test_medians_are_rounded_down():
  for args in ([1, 2], [1, 2, 9], [0, 3, 4, 9], [9, 9]):
    assert listops.OPERATORS['[MED'](args) == int(np.median(args)) == int(statistics.median(args))
