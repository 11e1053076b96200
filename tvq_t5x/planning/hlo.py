"""What one execution of a compiled XLA program does, read from the program itself.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, and so
does everything that it calls. All numbers are those of one device.
"""

# Protobuf makes the classes of its messages as they are imported.
# pyright: reportAttributeAccessIssue=false

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

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
# What others call, as a reduction its sum, runs for each element: it counts as part of them.
_CALLERS = frozenset({'async-start', 'call', 'conditional', 'fusion'})

_Computation = hlo_pb2.HloComputationProto
_Instruction = hlo_pb2.HloInstructionProto


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
    unknown_loops: loops whose length the program does not say; they count once.
  """

  flops: int
  num_bytes: int
  cycles: int
  collectives: Mapping[str, Collective]
  unknown_loops: int


class _Module:
  """A program, whose computations and instructions have numbers."""

  def __init__(self, proto: hlo_pb2.HloModuleProto):
    self._computations = {c.id: c for c in proto.computations}
    self._instructions = {x.id: x for c in proto.computations for x in c.instructions}
    self.entry = self._computations[proto.entry_computation_id]

  def root(self, computation: _Computation) -> _Instruction:
    return self._instructions[computation.root_id]

  def operands(self, instruction: _Instruction) -> list[_Instruction]:
    return [self._instructions[i] for i in instruction.operand_ids]

  def called(self, instruction: _Instruction) -> list[_Computation]:
    return [self._computations[i] for i in instruction.called_computation_ids]


def module_of(compiled: jax.stages.Compiled) -> hlo_pb2.HloModuleProto:
  """The program that JAX compiled, as the compiler left it."""
  executable: Any = compiled.runtime_executable()
  (module,) = executable.hlo_modules()
  return hlo_pb2.HloModuleProto.FromString(module.as_serialized_hlo_module_proto())


def work_of(program: hlo_pb2.HloModuleProto) -> Work:
  """Adds up what a program's instructions do."""
  module = _Module(program)
  flops = num_bytes = cycles = unknown_loops = 0
  found = collections.defaultdict(lambda: Collective(0, 0))
  for computation, times, fused in _executions(module):
    for x in computation.instructions:
      flops += times * _flops(x, module)
      kind = x.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        size = _collective_bytes(x, module)
        found[kind] = Collective(found[kind].count + times, found[kind].num_bytes + times * size)
      if x.opcode == 'while':
        unknown_loops += _trip_count(x, module) is None
      if not fused:
        num_bytes += times * _bytes(x, module)
        cycles += times * int(_notes(x).get('window_config', {}).get('estimated_cycles', 0))
  return Work(flops, num_bytes, cycles, dict(sorted(found.items())), unknown_loops)


def _executions(module: _Module) -> Iterator[tuple[_Computation, int, bool]]:
  """Every call of a computation: how often it runs, and whether inside a fusion."""
  stack = [(module.entry, 1, False)]
  while stack:
    computation, times, fused = stack.pop()
    yield computation, times, fused
    for x in computation.instructions:
      if x.opcode == 'while':
        body, _ = module.called(x)
        stack.append((body, times * (_trip_count(x, module) or 1), fused))
      elif x.opcode in _CALLERS:
        inside = fused or x.opcode == 'fusion'
        stack += [(called, times, inside) for called in module.called(x)]


def _notes(instruction: _Instruction) -> dict[str, Any]:
  """What the compiler wrote down for its own later stages."""
  try:
    notes = json.loads(instruction.backend_config or '{}')
  except ValueError:
    return {}  # Of a kernel that is called: anything.
  return notes if isinstance(notes, dict) else {}


def _trip_count(loop: _Instruction, module: _Module) -> int | None:
  """How often a loop runs: what the compiler noted, or the bound in its condition over the steps.

  Counters start at 0; the loops that overlap a matrix product with its communication take steps
  of 2.
  """
  if noted := _notes(loop).get('known_trip_count'):
    return int(noted['n'])
  body, condition = module.called(loop)
  bounds = _constants(condition, module)
  if not bounds:
    return None
  steps = [1]
  results = module.operands(module.root(body))
  for x in condition.instructions:
    if x.opcode == 'get-tuple-element' and results[x.tuple_index].opcode == 'add':
      steps += [n for y in module.operands(results[x.tuple_index]) for n in _constant(y)]
  return -(-max(bounds) // max(steps))


def _constants(computation: _Computation, module: _Module) -> list[int]:
  """The whole numbers that a computation, or one that it calls, mentions."""
  found = []
  for x in computation.instructions:
    found += _constant(x)
    if x.opcode in _CALLERS:
      found += [n for called in module.called(x) for n in _constants(called, module)]
  return found


def _constant(instruction: _Instruction) -> list[int]:
  value = instruction.literal
  scalar = instruction.opcode == 'constant' and not instruction.shape.dimensions
  numbers = [*value.s32s, *value.s64s, *value.u32s, *value.u64s]
  return [n for n in numbers if n >= 0] if scalar else []


def _size(shape: xla_data_pb2.ShapeProto) -> int:
  """Bytes of an array or tuple."""
  name = xla_data_pb2.PrimitiveType.Name(shape.element_type)
  width = re.search(r'\d+', name)  # As in F32, BF16, F8E4M3FN; PRED, TUPLE and TOKEN have none.
  bits = int(width[0]) if width else 8 * (name == 'PRED')
  return bits * math.prod(shape.dimensions) // 8 + sum(map(_size, shape.tuple_shapes))


def _sizes(instructions: list[_Instruction]) -> int:
  return sum(_size(x.shape) for x in instructions)


def _collective_bytes(instruction: _Instruction, module: _Module) -> int:
  operands, result = _sizes(module.operands(instruction)), _size(instruction.shape)
  if instruction.opcode in ('all-gather-start', 'collective-permute-start'):
    result -= operands  # They have operands and results in one tuple.
  return max(operands, result)


def _flops(instruction: _Instruction, module: _Module) -> int:
  if instruction.opcode == 'dot':
    left, _ = module.operands(instruction)
    contracted = instruction.dot_dimension_numbers.lhs_contracting_dimensions
    terms = math.prod(left.shape.dimensions[i] for i in contracted)
    return 2 * math.prod(instruction.shape.dimensions) * terms
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, module)
  return 0


def _convolution_flops(instruction: _Instruction, module: _Module) -> int:
  """A matrix product on TPU is a convolution, whose batch may be one of the window's axes."""
  left, right = (x.shape.dimensions for x in module.operands(instruction))
  out, axes = instruction.shape.dimensions, instruction.convolution_dimension_numbers
  products = out[axes.output_batch_dimension] * out[axes.output_feature_dimension]
  products *= right[axes.kernel_input_feature_dimension]
  for window, i, j, k in zip(
    instruction.window.dimensions,
    axes.input_spatial_dimensions,
    axes.kernel_spatial_dimensions,
    axes.output_spatial_dimensions,
    strict=True,
  ):
    products *= _positions(left[i], right[j], out[k], window)
  return 2 * products


def _positions(size: int, kernel: int, out: int, window: xla_data_pb2.WindowDimension) -> int:
  """Pairs of an output and a kernel position that meet an element rather than padding."""
  starts = np.arange(out, dtype=np.int64) * window.stride - window.padding_low
  dilation = window.base_dilation
  total = 0
  for i in range(kernel):
    at = starts + i * window.window_dilation
    inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
    total += int(np.count_nonzero(inside))
  return total


def _bytes(instruction: _Instruction, module: _Module) -> int:
  """Bytes read and written, of arrays that are only sliced those of the slices."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith('-done') or opcode.startswith('async-'):
    return 0
  if opcode in _SLICES:
    return 2 * _size(instruction.shape)
  if opcode == 'dynamic-update-slice':
    return 2 * _written(instruction, module)
  if opcode == 'fusion':
    (body,) = module.called(instruction)
    return _fusion_bytes(body, module)
  return _sizes(module.operands(instruction)) + _size(instruction.shape)


def _fusion_bytes(body: _Computation, module: _Module) -> int:
  users = collections.defaultdict(list)
  for x in body.instructions:
    for i, operand in enumerate(x.operand_ids):
      users[operand].append((x, i))
  read = sum(_read(x, users) for x in body.instructions if x.opcode == 'parameter')
  root = module.root(body)
  results = module.operands(root) if root.opcode == 'tuple' else [root]
  return read + sum(_written(x, module) for x in results)


def _read(value: _Instruction, users: Mapping[int, list[tuple[_Instruction, int]]]) -> int:
  """Bytes that a fusion reads of a parameter."""
  total = 0
  for user, index in users[value.id]:
    if user.opcode == 'bitcast':
      total += _read(user, users)
    elif user.opcode in _SLICES and index == 0:
      total += _size(user.shape)
    elif user.opcode == 'dynamic-update-slice' and index == 0:
      continue  # It is written in place.
    else:
      return _size(value.shape)
  return min(total, _size(value.shape))


def _written(value: _Instruction, module: _Module) -> int:
  """Bytes of a fusion's result, of one that is updated in place those of the update."""
  while value.opcode == 'bitcast':
    (value,) = module.operands(value)
  if value.opcode == 'dynamic-update-slice':
    _, value, *_ = module.operands(value)
  return _size(value.shape)
