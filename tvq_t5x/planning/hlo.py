"""A compiled XLA program: its computations, what they call, and how often."""

# Protobuf makes the classes of its messages as they are imported.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from tensorflow.compiler.xla.service import hlo_pb2

from tvq_t5x.common.errors import ConfigError, reason

Computation = hlo_pb2.HloComputationProto
Instruction = hlo_pb2.HloInstructionProto
ProgramProto = hlo_pb2.HloModuleProto

# What others call, as a reduction its sum, runs for each element: it counts as part of them.
_CALLERS = frozenset({'async-start', 'call', 'conditional', 'fusion'})


class Execution(NamedTuple):
  """A computation and how it runs."""

  computation: Computation
  times: int
  fused: bool  # Whether it is part of one instruction, which has its bytes and cycles.
  asynchronous: bool  # Whether other instructions run meanwhile.


class Module:
  """A program, whose computations and instructions have numbers."""

  def __init__(self, proto: ProgramProto):
    self._computations = {c.id: c for c in proto.computations}
    self._instructions = {x.id: x for c in proto.computations for x in c.instructions}
    self.entry = self._computations[proto.entry_computation_id]

  def root(self, computation: Computation) -> Instruction:
    """What a computation returns."""
    return self._instructions[computation.root_id]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """What an instruction takes."""
    return [self._instructions[i] for i in instruction.operand_ids]

  def called(self, instruction: Instruction) -> list[Computation]:
    """What an instruction calls."""
    return [self._computations[i] for i in instruction.called_computation_ids]

  def runs_meanwhile(self, instruction: Instruction) -> bool:
    """Whether it starts or ends what goes on while other instructions run."""
    if instruction.opcode == 'fusion':
      called = (x for c in self.called(instruction) for x in c.instructions)
      return any(x.custom_call_target.startswith('AsyncCollective') for x in called)
    return instruction.opcode in ('async-start', 'copy-start')

  def executions(self) -> Iterator[Execution]:
    """Every call of a computation."""
    stack = [Execution(self.entry, 1, fused=False, asynchronous=False)]
    while stack:
      this = stack.pop()
      yield this
      for x in this.computation.instructions:
        if x.opcode == 'while':
          body, _ = self.called(x)
          times = this.times * (trip_count(x, self) or 1)
          stack.append(this._replace(computation=body, times=times))
        elif x.opcode in _CALLERS:
          inside = this._replace(
            fused=this.fused or x.opcode == 'fusion',
            asynchronous=this.asynchronous or self.runs_meanwhile(x),
          )
          stack += [inside._replace(computation=called) for called in self.called(x)]


def module_of(compiled: jax.stages.Compiled) -> ProgramProto:
  """The program that JAX compiled, as the compiler left it.

  Raises:
    ConfigError: if JAX can't read it, as of a later libtpu than it goes with.
  """
  executable: Any = compiled.runtime_executable()
  try:
    (module,) = executable.hlo_modules()
  except jax.errors.JaxRuntimeError as e:
    raise ConfigError(
      'The program is compiled, but this JAX can not read what libtpu made of it '
      f'({reason(e)}) Install the version that goes with JAX: pip install "jax[tpu]".'
    ) from e
  return ProgramProto.FromString(module.as_serialized_hlo_module_proto())


def notes(instruction: Instruction) -> dict[str, Any]:
  """What the compiler wrote down for its own later stages."""
  try:
    found = json.loads(instruction.backend_config or '{}')
  except ValueError:
    return {}  # Of a kernel that is called: anything.
  return found if isinstance(found, dict) else {}


def trip_count(loop: Instruction, module: Module) -> int | None:
  """How often a loop runs: what the compiler noted, or the bound in its condition over the steps.

  Counters start at 0; the loops that overlap a matrix product with its communication take steps
  of 2.
  """
  if noted := notes(loop).get('known_trip_count'):
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


def _constants(computation: Computation, module: Module) -> list[int]:
  """The whole numbers that a computation, or one that it calls, mentions."""
  found = []
  for x in computation.instructions:
    found += _constant(x)
    if x.opcode in _CALLERS:
      found += [n for called in module.called(x) for n in _constants(called, module)]
  return found


def _constant(instruction: Instruction) -> list[int]:
  value = instruction.literal
  scalar = instruction.opcode == 'constant' and not instruction.shape.dimensions
  numbers = [*value.s32s, *value.s64s, *value.u32s, *value.u64s]
  return [n for n in numbers if n >= 0] if scalar else []


def goes_on(instruction: Instruction) -> bool:
  """Whether it is a piece of a collective that another fusion started, and computes beside it.

  The collective stands in each of the fusions, of which the first has no flags.
  """
  config = notes(instruction).get('async_collective_fusion_config', {})
  return int(config.get('flag_start', -1)) >= 0
