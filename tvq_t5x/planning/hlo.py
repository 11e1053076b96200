"""What one execution of a compiled XLA program does, read from the program's text.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, and so
does everything that it calls. All numbers are those of one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# They name memory or control flow and move nothing themselves.
_FREE = frozenset(
  'after-all bitcast call conditional constant get-tuple-element iota opt-barrier parameter '
  'partition-id replica-id tuple while'.split()
)
_SLICES = frozenset({'dynamic-slice', 'gather', 'slice'})


class Collective(NamedTuple):
  """All collectives of one kind."""

  count: int  # Executions.
  num_bytes: int  # Of the whole array on each device: gathered, or before it is scattered.


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in one execution of a program.

  Attributes:
    flops: of matrix products and convolutions, a multiplication and an addition each.
    num_bytes: that its instructions read and write, in any memory.
    cycles: the compiler's own estimate; 0 where the compiler writes none (CPU).
    collectives: by kind.
    unknown_loops: loops whose length the text does not say; they count once.
  """

  flops: int
  num_bytes: int
  cycles: int
  collectives: Mapping[str, Collective]
  unknown_loops: int


class _Instruction(NamedTuple):
  name: str
  shape: str  # Text such as 'f32[8,128]{1,0}', or a tuple of them.
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


_Computation = dict[str, _Instruction]


def work_of(text: str) -> Work:
  """Reads the text of a compiled program (`compiled.as_text()`)."""
  computations, entry = _parse(text)
  flops = num_bytes = cycles = unknown_loops = 0
  found = collections.defaultdict(lambda: Collective(0, 0))
  for computation, times, fused in _executions(computations, entry):
    for instruction in computation.values():
      flops += times * _flops(instruction, computation)
      kind = instruction.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        size = _collective_bytes(instruction, computation)
        found[kind] = Collective(found[kind].count + times, found[kind].num_bytes + times * size)
      if instruction.opcode == 'while':
        unknown_loops += _trip_count(instruction, computations) is None
      if not fused:
        num_bytes += times * _bytes(instruction, computation, computations)
        cycles += times * _cycles(instruction)
  return Work(flops, num_bytes, cycles, dict(sorted(found.items())), unknown_loops)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """All computations by name, and the name of the one that runs first."""
  computations: dict[str, _Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if current is None:
      head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*{$', line)
      if head:
        current = computations[head[2]] = {}
        entry = head[2] if head[1] else entry
    elif line == '}':
      current = None
    elif instruction := _parse_instruction(line):
      current[instruction.name] = instruction
  return computations, entry


def _parse_instruction(line: str) -> _Instruction | None:
  head = re.match(r'\s+(ROOT )?%?([\w.-]+) = ', line)
  if not head:
    return None
  rest = line[head.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end + 1 :]
  start = rest.index('(')
  end = _closing(rest, start)
  operands = re.sub(r'/\*.*?\*/', '', rest[start + 1 : end])
  # An operand may have its shape before its name.
  names = re.findall(r'%([\w.-]+)', operands) or re.findall(r'([\w.-]+)(?:,|$)', operands)
  return _Instruction(
    head[2], shape, rest[:start], tuple(names), rest[end + 1 :], is_root=bool(head[1])
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile('[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'A parenthesis is not closed: {text[start : start + 80]}')


def _executions(
  computations: Mapping[str, _Computation], entry: str
) -> Iterator[tuple[_Computation, int, bool]]:
  """Every call of a computation: how often it runs, and whether inside a fusion."""
  stack = [(entry, 1, False)]
  while stack:
    name, times, fused = stack.pop()
    computation = computations[name]
    yield computation, times, fused
    for instruction in computation.values():
      if instruction.opcode == 'while':
        count = _trip_count(instruction, computations)
        stack.append((_called(instruction, 'body')[0], times * (count or 1), fused))
        continue
      inside = fused or instruction.opcode == 'fusion'
      names = _called(instruction, 'calls') + _called(instruction, 'branch_computations')
      if instruction.opcode == 'call':
        names += _called(instruction, 'to_apply')
      stack += [(called, times, inside) for called in names]


def _called(instruction: _Instruction, attribute: str) -> list[str]:
  found = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)', instruction.attributes)
  return re.findall(r'[\w.-]+', found[1]) if found else []


def _trip_count(loop: _Instruction, computations: Mapping[str, _Computation]) -> int | None:
  """How often a loop runs: what its text says, or the bound in its condition over the steps to it.

  Counters start at 0; the loops that overlap a matrix product with its communication take steps
  of 2.
  """
  if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(found[1])
  (condition,), (body,) = _called(loop, 'condition'), _called(loop, 'body')
  bounds = _constants(condition, computations)
  if not bounds:
    return None
  steps = [1]
  counters = [x for x in computations[condition].values() if x.opcode == 'get-tuple-element']
  results = next(x for x in computations[body].values() if x.is_root).operands
  for counter in counters:
    index = re.search(r'index=(\d+)', counter.attributes)
    update = computations[body].get(results[int(index[1])]) if index else None
    if update is not None and update.opcode == 'add':
      steps += [n for name in update.operands for n in _constant(computations[body][name])]
  return -(-max(bounds) // max(steps))


def _constants(name: str, computations: Mapping[str, _Computation]) -> list[int]:
  """The integers that a computation, or one that it calls, mentions."""
  found = []
  for instruction in computations[name].values():
    found += _constant(instruction)
    for called in _called(instruction, 'calls'):
      found += _constants(called, computations)
  return found


def _constant(instruction: _Instruction) -> list[int]:
  # The number stands where other instructions have operands.
  scalar = instruction.opcode == 'constant' and re.match(r'[su]\d+\[\]', instruction.shape)
  return [int(name) for name in instruction.operands if name.isdigit()] if scalar else []


def _dims(shape: str) -> list[tuple[int, ...]]:
  """Of an array, or of those in a tuple."""
  return [
    tuple(map(int, dims.split(','))) if dims else ()
    for dims in re.findall(r'\w+\[([\d,]*)\]', shape)
  ]


def _size(shape: str) -> int:
  """Bytes of an array or tuple."""
  bits = 0
  for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shape):
    width = re.search(r'\d+', dtype)  # As in f32, bf16, f8e4m3fn; pred and token have none.
    elements = math.prod(map(int, dims.split(','))) if dims else 1
    bits += elements * (int(width[0]) if width else 8 * (dtype == 'pred'))
  return bits // 8


def _operand_size(instruction: _Instruction, index: int, computation: _Computation) -> int:
  return _size(computation[instruction.operands[index]].shape)


def _cycles(instruction: _Instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(found[1]) if found else 0


def _collective_bytes(instruction: _Instruction, computation: _Computation) -> int:
  operands = sum(_size(computation[name].shape) for name in instruction.operands)
  result = _size(instruction.shape)
  if instruction.opcode in ('all-gather-start', 'collective-permute-start'):
    result -= operands  # They have operands and results in one tuple.
  return max(operands, result)


def _flops(instruction: _Instruction, computation: _Computation) -> int:
  if instruction.opcode == 'dot':
    return _dot_flops(instruction, computation)
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, computation)
  return 0


def _dot_flops(instruction: _Instruction, computation: _Computation) -> int:
  (left,) = _dims(computation[instruction.operands[0]].shape)
  found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
  contracted = [left[int(i)] for i in found[1].split(',')] if found and found[1] else []
  return 2 * math.prod(_dims(instruction.shape)[0]) * math.prod(contracted)


def _convolution_flops(instruction: _Instruction, computation: _Computation) -> int:
  """A matrix product on TPU is a convolution, whose batch may be one of the window's axes."""
  left, right = (_dims(computation[name].shape)[0] for name in instruction.operands)
  (out,) = _dims(instruction.shape)
  (labels,) = re.findall(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  left, right, out = (
    dict(zip(names, dims, strict=True))
    for names, dims in zip(labels, (left, right, out), strict=True)
  )
  window = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  window = dict(re.findall(r'(\w+)=(\S+)', window[1])) if window else {}

  def axis(name, i, default):
    return window[name].split('x')[i] if name in window else default

  products = out['b'] * out['f'] * right['i']
  for i in range(len(out) - 2):
    pad, _ = axis('pad', i, '0_0').split('_')
    steps = (int(axis(name, i, 1)) for name in ('stride', 'lhs_dilate', 'rhs_dilate'))
    products *= _positions(left[str(i)], right[str(i)], out[str(i)], int(pad), *steps)
  return 2 * products


def _positions(
  size: int, kernel: int, out: int, pad: int, stride: int, dilation: int, kernel_dilation: int
) -> int:
  """Pairs of an output and a kernel position that meet an element rather than padding."""
  starts = np.arange(out, dtype=np.int64) * stride - pad
  total = 0
  for i in range(kernel):
    at = starts + i * kernel_dilation
    inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
    total += int(np.count_nonzero(inside))
  return total


def _bytes(
  instruction: _Instruction,
  computation: _Computation,
  computations: Mapping[str, _Computation],
) -> int:
  """Bytes read and written, of arrays that are only sliced those of the slices."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith('-done') or opcode.startswith('async-'):
    return 0
  if opcode in _SLICES:
    return 2 * _size(instruction.shape)
  if opcode == 'dynamic-update-slice':
    return 2 * _operand_size(instruction, 1, computation)
  if opcode == 'fusion':
    return _fusion_bytes(computations[_called(instruction, 'calls')[0]])
  read = sum(_size(computation[name].shape) for name in instruction.operands)
  return read + _size(instruction.shape)


def _fusion_bytes(body: _Computation) -> int:
  users = collections.defaultdict(list)
  for instruction in body.values():
    for i, name in enumerate(instruction.operands):
      users[name].append((instruction, i))
  read = sum(_read(x, users, body) for x in body.values() if x.opcode == 'parameter')
  (root,) = (x for x in body.values() if x.is_root)
  results = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  return read + sum(_written(x, body) for x in results)


def _read(value: _Instruction, users: Mapping[str, list], body: _Computation) -> int:
  """Bytes that a fusion reads of a parameter."""
  total = 0
  for user, index in users[value.name]:
    if user.opcode == 'bitcast':
      total += _read(user, users, body)
    elif user.opcode in _SLICES and index == 0:
      total += _size(user.shape)
    elif user.opcode == 'dynamic-update-slice' and index == 0:
      continue  # It is written in place.
    else:
      return _size(value.shape)
  return min(total, _size(value.shape))


def _written(value: _Instruction, body: _Computation) -> int:
  while value.opcode == 'bitcast':
    value = body[value.operands[0]]
  if value.opcode == 'dynamic-update-slice':
    return _operand_size(value, 1, body)
  return _size(value.shape)
