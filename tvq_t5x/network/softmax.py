"""Averages of values with one softmax over several groups of keys, each in arrays of its own."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tvq_t5x.network import xla
from tvq_t5x.network.layers import save_for_backward


def softmax_average(
  equation: str, scores: Sequence[jax.Array], values: Sequence[jax.Array]
) -> jax.Array:
  """Averages values with one softmax over the keys of all groups.

  In training the gradient takes the weights and the average, and of all that precedes the weights
  just the highest score and the mass: these two and the average are marked with
  `save_for_backward` (Dao et al. 2022, "FlashAttention", appendix B.2).

  Args:
    equation: einsum's, of a group's weights and values, such as 'BNGLJ,BNJV->BNGLV': the weights
      and the result have all axes but the last in common.
    scores: of each group, [..., L, J] float32.
    values: of each group, [..., J, V].

  Returns:
    [..., L, V] in the dtype of the values.
  """
  function = _average_in_training if xla.in_training() else _average
  return function(equation, tuple(scores), tuple(values))


def softmax_weights(scores: Sequence[jax.Array], dtype: DTypeLike) -> list[jax.Array]:
  """Weights of one softmax over the keys of all groups, [..., L, J] of each group, in `dtype`.

  The highest score of each query and the mass are marked with `save_for_backward`.
  """
  with jax.named_scope('scores'):
    peak = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
    peak = save_for_backward(jax.lax.stop_gradient(peak), small=True)
    weights = [jnp.exp(x - peak) for x in scores]
    mass = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
    mass = save_for_backward(mass, small=True)
    return [(x * (1.0 / mass)).astype(dtype) for x in weights]


def score_gradients(
  equation: str,
  weights: Sequence[jax.Array],
  values: Sequence[jax.Array],
  out: jax.Array,
  g: jax.Array,
) -> tuple[jax.Array, ...]:
  """The gradients of the scores, float32, from that of `out`, the average."""
  left, right, result = xla.operands(equation)
  mean = xla.sum_of_products(out, g)  # Of what a weight gets.
  return tuple(
    x * (jnp.einsum(f'{result},{right}->{left}', g, v, preferred_element_type=jnp.float32) - mean)
    for x, v in zip(weights, values, strict=True)
  )


def _average(equation, scores, values):
  return _average_fwd(equation, scores, values)[0]


def _average_fwd(equation, scores, values):
  weights = softmax_weights(scores, values[0].dtype)
  with jax.named_scope('values'):
    totals = [
      jnp.einsum(equation, x, v, preferred_element_type=jnp.float32)
      for x, v in zip(weights, values, strict=True)
    ]
    out = save_for_backward(functools.reduce(jnp.add, totals).astype(values[0].dtype))
  return out, (weights, values, out)


_average_in_training = jax.custom_vjp(_average, nondiff_argnums=(0,))


@jax.named_scope('values')
def _average_bwd(equation, residuals, g):
  weights, values, out = residuals
  left, right, result = xla.operands(equation)
  d_values = tuple(jnp.einsum(f'{result},{left}->{right}', g, x) for x in weights)
  return score_gradients(equation, weights, values, out, g), d_values


_average_in_training.defvjp(_average_fwd, _average_bwd)
