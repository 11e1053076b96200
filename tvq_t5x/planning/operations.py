"""What one instruction of a compiled XLA program costs."""

# Protobuf makes the classes of its messages as they are imported.
# pyright: reportAttributeAccessIssue=false

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tensorflow.compiler.xla import xla_data_pb2

from tvq_t5x.planning.hlo import Computation, Instruction, Module, goes_on, notes

# They name memory or control flow and move nothing themselves.
_FREE = frozenset(
  'after-all bitcast call conditional constant get-tuple-element iota opt-barrier parameter '
  'partition-id replica-id tuple while'.split()
)
# Memory that is not written yet, and neighbors in memory that become one array.
_FREE_TARGETS = frozenset({'AllocateBuffer', 'ConcatBitcast'})
_DONE = 'AsyncCollectiveDone'
_SLICES = frozenset({'dynamic-slice', 'gather', 'slice'})
# They move elements and compute nothing with them.
_MOVES = frozenset(
  'broadcast concatenate copy copy-start dynamic-slice dynamic-update-slice pad reshape '
  'reverse slice transpose'.split()
)

_Users = Mapping[int, Sequence[tuple[Instruction, int]]]


# What the compiler writes where it has no estimate: the largest number of 64 bits.
_NO_ESTIMATE = 2**63 - 1


def cycles(instruction: Instruction) -> int:
  """The compiler's own estimate; 0 where it has none."""
  found = int(notes(instruction).get('window_config', {}).get('estimated_cycles', 0))
  return 0 if found == _NO_ESTIMATE else found


def moves_only(instruction: Instruction, module: Module) -> bool:
  """Whether it copies, slices or joins arrays, and computes nothing."""
  opcodes = {x.opcode for x in _parts(instruction, module)} - _FREE
  if 'pad' in opcodes:  # XLA joins arrays as the maximum of padded ones.
    opcodes -= {'convert', 'maximum'}
  return opcodes <= _MOVES


def op_name(instruction: Instruction, module: Module) -> str:
  """The scopes and the operation of JAX that it comes from; of a fusion, where its result does."""
  names = [x.metadata.op_name for x in _parts(instruction, module)]
  return instruction.metadata.op_name or next(filter(None, reversed(names)), '')


def _parts(instruction: Instruction, module: Module) -> Iterator[Instruction]:
  """The instructions of a fusion, or the only one."""
  if instruction.opcode != 'fusion':
    yield instruction
    return
  for computation in module.called(instruction):
    for x in computation.instructions:
      yield from _parts(x, module)


def size_of(shape: xla_data_pb2.ShapeProto) -> int:
  """Bytes of an array or tuple."""
  name = xla_data_pb2.PrimitiveType.Name(shape.element_type)
  width = re.search(r'\d+', name)  # As in F32, BF16, F8E4M3FN; PRED, TUPLE and TOKEN have none.
  bits = int(width[0]) if width else 8 * (name == 'PRED')
  return bits * math.prod(shape.dimensions) // 8 + sum(map(size_of, shape.tuple_shapes))


def sizes_of(instructions: Sequence[Instruction]) -> int:
  """Bytes of several results."""
  return sum(size_of(x.shape) for x in instructions)


def flops(instruction: Instruction, module: Module) -> int:
  """Multiplications and additions of a matrix product or convolution; 0 of anything else."""
  if instruction.opcode == 'dot':
    left, _ = module.operands(instruction)
    contracted = instruction.dot_dimension_numbers.lhs_contracting_dimensions
    terms = math.prod(left.shape.dimensions[i] for i in contracted)
    return 2 * math.prod(instruction.shape.dimensions) * terms
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, module)
  return 0


def _convolution_flops(instruction: Instruction, module: Module) -> int:
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


def num_bytes(instruction: Instruction, module: Module) -> int:
  """Bytes read and written, of arrays that are only sliced those of the slices."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith('-done') or opcode.startswith('async-'):
    return 0
  if instruction.custom_call_target in _FREE_TARGETS:
    return 0
  if opcode in _SLICES:
    return 2 * size_of(instruction.shape)
  if opcode == 'dynamic-update-slice':
    return 2 * _written(instruction, module)
  if opcode == 'fusion':
    (body,) = module.called(instruction)
    return _fusion_bytes(body, module)
  operands = sizes_of(module.operands(instruction))
  if opcode == 'copy-start':
    return 2 * operands
  if opcode.endswith('-start'):
    return operands + result_bytes(instruction, module)
  return operands + size_of(instruction.shape)


def result_bytes(start: Instruction, module: Module) -> int:
  """Bytes that the start of an asynchronous instruction, or a synchronous one, gives."""
  result = size_of(start.shape)
  if start.opcode in ('all-gather-start', 'collective-permute-start'):
    result -= sizes_of(module.operands(start))  # They have operands and results in one tuple.
  return result


def _fusion_bytes(body: Computation, module: Module) -> int:
  users = _users(body)
  read = sum(_read(x, users, module) for x in body.instructions if x.opcode == 'parameter')
  root = module.root(body)
  results = module.operands(root) if root.opcode == 'tuple' else [root]
  return read + sum(_written(x, module) for x in results)


def _read(value: Instruction, users: _Users, module: Module) -> int:
  """Bytes that a fusion reads of a parameter, at most all of it."""
  whole, total = size_of(value.shape), 0
  for user, index in users[value.id]:
    if user.opcode == 'bitcast':
      total += _read(user, users, module)
    elif user.opcode == 'fusion':
      (inner,) = module.called(user)
      inner_users = _users(inner)
      parameters = (x for x in inner.instructions if x.opcode == 'parameter')
      total += sum(_read(x, inner_users, module) for x in parameters if x.parameter_number == index)
    elif user.opcode in _SLICES and index == 0:
      total += size_of(user.shape)
    elif user.opcode == 'dynamic-update-slice' and index == 0:
      continue  # It is written in place.
    elif user.opcode == 'tuple' or user.custom_call_target == _DONE or goes_on(user):
      continue  # It is handed on as it is.
    else:
      return whole
  return min(total, whole)


def _users(body: Computation) -> _Users:
  """Which instructions of a computation take a value, and as which operand."""
  users = collections.defaultdict(list)
  for x in body.instructions:
    for i, operand in enumerate(x.operand_ids):
      users[operand].append((x, i))
  return users


def _written(value: Instruction, module: Module) -> int:
  """Bytes of a fusion's result, of one that is updated in place those of the update."""
  while value.opcode == 'bitcast':
    (value,) = module.operands(value)
  if value.opcode == 'fusion':
    (body,) = module.called(value)
    return _written(module.root(body), module)
  if value.opcode == 'parameter' or value.custom_call_target == _DONE or goes_on(value):
    return 0  # It was there before.
  if value.opcode == 'dynamic-update-slice':
    _, value, *_ = module.operands(value)
  return size_of(value.shape)
