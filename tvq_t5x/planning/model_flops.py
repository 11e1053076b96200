"""What the model itself takes, whatever a program computes again or adds for its own sake."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from tvq_t5x.planning.program import Program
from tvq_t5x.training import placement


def model_flops(program: Program) -> int:
  """FLOP of a batch on all devices, as model FLOPs utilization (MFU) counts them.

  They are three times the matrix products of the forward pass, a multiplication and an addition
  each: the backward pass has two for each. Nothing is recomputed, and elementwise work and Fourier
  transforms count nothing.
  """
  model, rows = program.model, program.batch_size // program.num_microbatches
  batch = model.batch_spec(rows, program.update_len)
  params = placement.abstract_params(program.partitioner, model)
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  state = None
  if program.num_updates > 1 or model.carry_state:
    state = jax.eval_shape(lambda: model.init_state(rows))

  def loss(params, batch, state):
    return model.segment_loss(params, batch, state, None, 1.0)[0]

  forward = forward_flops(jax.make_jaxpr(loss)(params, batch, state).jaxpr)
  return 3 * forward * program.num_microbatches * program.num_updates


def forward_flops(jaxpr: core.Jaxpr) -> int:
  """FLOP of the matrix products and convolutions of what was traced; of branches, the most."""
  total = 0
  for equation in jaxpr.eqns:
    inner = [forward_flops(x) for x in _inner(equation.params)]
    name = equation.primitive.name
    if name == 'dot_general':
      total += _product_flops(equation)
    elif name == 'conv_general_dilated':
      total += _convolution_flops(equation)
    elif name == 'scan':
      total += equation.params['length'] * sum(inner)
    elif name == 'cond':
      total += max(inner)
    else:
      total += sum(inner)
  return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
    if isinstance(x, core.ClosedJaxpr):
      yield x.jaxpr
    elif isinstance(x, core.Jaxpr):
      yield x


def _product_flops(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  terms = math.prod(_shape(equation.invars[0])[i] for i in contracted)
  return 2 * math.prod(_shape(equation.outvars[0])) * terms


def _convolution_flops(equation: core.JaxprEqn) -> int:
  """Padding counts too."""
  kernel, numbers = _shape(equation.invars[1]), equation.params['dimension_numbers']
  outputs = kernel[numbers.rhs_spec[0]]
  return 2 * math.prod(_shape(equation.outvars[0])) * (math.prod(kernel) // outputs)


def _shape(value: Any) -> tuple[int, ...]:
  return value.aval.shape
