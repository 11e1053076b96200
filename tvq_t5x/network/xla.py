"""Programs that XLA compiles well where it compiles the plain ones badly, with the same values.

The plain programs are what a model runs outside of training, so that it can be differentiated in
any way, forward too. In `training_gradients()`, which the engines enter around the gradients of a
loss, some have a backward program of their own, that JAX can't differentiate forward.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_in_training = jax.make_user_context(False)


def training_gradients() -> Any:
  """A context: functions of this module that are traced in it have their own gradients."""
  return _in_training(True)


def in_training() -> bool:
  """Whether what is traced is differentiated in `training_gradients()`."""
  return _in_training.value


def platform() -> str:
  """Of the devices that the program being traced is for: 'cpu', 'gpu' or 'tpu'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def computed_once(x: jax.Array) -> jax.Array:
  """Identity; on TPU x is written to memory, and not computed within what takes it."""
  return jax.lax.optimization_barrier(x) if platform() == 'tpu' else x


# Up to how many arrays XLA on TPU joins as the maximum of all of them, padded.
_FEW = 4


def stack(arrays: Sequence[jax.Array]) -> jax.Array:
  """`jnp.stack`; on TPU, what computes one of few arrays writes it where it belongs."""
  if platform() != 'tpu' or len(arrays) > _FEW:
    return jnp.stack(arrays)
  stacked = jax.lax.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
  for i, x in enumerate(arrays):
    stacked = jax.lax.dynamic_update_index_in_dim(stacked, x, i, 0)
  return stacked


def gradient_once(x: jax.Array) -> jax.Array:
  """Identity on the result of a product in float32, whose gradient on TPU is computed once.

  In training on TPU, it is written to memory as the products with it take it, in bfloat16: else
  each of them would compute it from the loss again.
  """
  precision = jax.config.jax_default_matmul_precision  # pyright: ignore
  by_default = precision in (None, 'default', 'bfloat16')
  if not in_training() or platform() != 'tpu' or x.dtype != jnp.float32 or not by_default:
    return x
  return _gradient_once(x)


@jax.custom_vjp
def _gradient_once(x):
  return x


def _gradient_once_bwd(_, g):
  return (jax.lax.optimization_barrier(g.astype(jnp.bfloat16)).astype(jnp.float32),)


_gradient_once.defvjp(lambda x: (x, None), _gradient_once_bwd)


def on_one_device() -> bool:
  """Whether arrays being traced are one device's, not shared by several."""
  mesh, manual = jax.sharding.get_abstract_mesh(), jax.sharding.AxisType.Manual
  sharing = [n for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind != manual]
  return (jax.device_count() if mesh.empty else math.prod(sharing)) == 1


def row_major(x: jax.Array) -> jax.Array:
  """Identity; on TPU, where no devices share x, it is in memory with its last axis fastest."""
  # For several v5p chips, the compiler of libtpu 0.0.42 gathers on each what they share.
  if platform() != 'tpu' or not on_one_device():
    return x
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
  """`jnp.einsum` of two operands; in training on CPU its gradients take half of einsum's own time.

  Args:
    equation: einsum's.
    x: first operand.
    y: second operand, of the same dtype.
    dtype: of the result; None means that of the operands.

  Returns:
    The product, whose gradients have the dtype of the operands.
  """
  function = _einsum if _in_training.value else _plain_einsum
  return function(equation, x, y, dtype)


def _plain_einsum(equation, x, y, dtype):
  return jnp.einsum(equation, x, y, preferred_element_type=dtype)


_einsum = jax.custom_vjp(_plain_einsum, nondiff_argnums=(0, 3))


def _einsum_fwd(equation, x, y, dtype):
  return _plain_einsum(equation, x, y, dtype), (x, y)


def _einsum_bwd(equation, dtype, residuals, g):
  del dtype
  return jax.lax.platform_dependent(
    *residuals,
    g.astype(residuals[0].dtype),
    cpu=functools.partial(_einsum_gradients_on_cpu, equation),
    default=functools.partial(_einsum_gradients, equation),
  )


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _einsum_gradients(equation, x, y, g):
  left, right, out = operands(equation)
  return jnp.einsum(f'{out},{right}->{left}', g, y), jnp.einsum(f'{out},{left}->{right}', g, x)


def _einsum_gradients_on_cpu(equation, x, y, g):
  left, right, out = operands(equation)
  # Both products below read g: without the barrier XLA computes it again inside each of them.
  g = jax.lax.optimization_barrier(g)
  x_gradient = jnp.einsum(f'{out},{right}->{left}', g, y)
  # A product that contracts positions transposes its first operand: let that be the smaller one.
  # Einsum takes them in the order in which the result names their axes.
  (first, a), (second, b) = sorted([(left, x), (out, g)], key=lambda pair: pair[1].size)
  axes = [c for c in right if c in first]
  axes += [c for c in right if c in second and c not in axes]
  y_gradient = jnp.einsum(f'{first},{second}->{"".join(axes)}', a, b)
  return x_gradient, y_gradient.transpose([axes.index(c) for c in right])


def operands(equation: str) -> tuple[str, str, str]:
  """The letters of the two operands and of the result of an einsum."""
  inputs, out = equation.split('->')
  left, right = inputs.split(',')
  return left, right, out


# How many rows a TPU's matrix units multiply in the time of one.
_TPU_ROWS = 8


def einsum_of_few_rows(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
  """`jnp.einsum` where x may have a single row to multiply y with, as while tokens are generated.

  XLA on TPU would do that outside of the matrix units, in several times the time that it takes to
  read y: there, few rows come with copies of themselves. Not for training.

  Args:
    equation: einsum's; rows are the axes of x that the result has and y does not.
    x: first operand.
    y: second operand, of the same dtype.
    dtype: of the result; None means that of the operands.

  Returns:
    The product.
  """
  left, right, out = operands(equation)
  rows = [size for c, size in zip(left, x.shape, strict=True) if c in out and c not in right]
  if platform() != 'tpu' or math.prod(rows) >= _TPU_ROWS:
    return _plain_einsum(equation, x, y, dtype)
  return _einsum_of_copies(equation, x, y, dtype)


def _einsum_of_copies(equation, x, y, dtype):
  left, right, out = operands(equation)
  at = len(os.path.commonprefix([left, out]))
  copies = jnp.broadcast_to(jnp.expand_dims(x, at), (*x.shape[:at], _TPU_ROWS, *x.shape[at:]))
  # Without barriers, XLA would multiply without the copies.
  copies = jax.lax.optimization_barrier(copies)
  equation = f'{left[:at]}z{left[at:]},{right}->{out[:at]}z{out[at:]}'
  product = jax.lax.optimization_barrier(_plain_einsum(equation, copies, y, dtype))
  return jax.lax.index_in_dim(product, 0, at, keepdims=False)


def scale_and_shift(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """`x * scale + bias` over the last axis of x.

  In training on CPU, the sums of its gradients take a tenth of XLA's own time.
  """
  function = _scale_and_shift if _in_training.value else _plain_scale_and_shift
  return function(x, scale, bias)


def _plain_scale_and_shift(x, scale, bias):
  return x * scale + bias


_scale_and_shift = jax.custom_vjp(_plain_scale_and_shift)


def _scale_and_shift_fwd(x, scale, bias):
  return x * scale + bias, (x, scale)


def _scale_and_shift_bwd(residuals, g):
  x, scale = residuals
  sums = {'cpu': _sum_positions_on_cpu, 'default': _sum_positions}
  return g * scale, *jax.lax.platform_dependent(g * x, g, **sums)


_scale_and_shift.defvjp(_scale_and_shift_fwd, _scale_and_shift_bwd)


def _sum_positions(*arrays):
  """Sums of arrays [..., D] over all axes but the last."""
  return [jnp.sum(y, axis=range(y.ndim - 1)) for y in arrays]


def _sum_positions_on_cpu(*arrays):
  """`_sum_positions` as products, which XLA splits among cores."""

  def total(y):
    ones = jnp.ones(y.shape[:-1], y.dtype)  # Not reshaped: devices may share either axis.
    total = jnp.tensordot(ones, y, ones.ndim, preferred_element_type=jnp.float32)
    return total.astype(y.dtype)

  return [total(y) for y in arrays]


# Columns of a TPU's matrix units.
_TPU_COLUMNS = 128


def sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sums of `x * y` over the last axis, [..., 1] float32.

  On TPU, matrix units sum products in bfloat16, each rounded to it, in half of the time.
  """
  if platform() != 'tpu' or x.dtype != jnp.bfloat16 or y.dtype != jnp.bfloat16:
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
  ones = jnp.ones((x.shape[-1], _TPU_COLUMNS), x.dtype)
  return jnp.matmul(x * y, ones, preferred_element_type=jnp.float32)[..., :1]


def sum_of_einsums(equation: str, xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
  """The sum of `jnp.einsum(equation, x, y)` over pairs of arrays, float32.

  On TPU, pairs of the same shapes are one product, which is summed in the matrix units: XLA would
  write one to memory, and read it to add the other.
  """
  f32 = {'preferred_element_type': jnp.float32}
  shapes = {(x.shape, y.shape) for x, y in zip(xs, ys, strict=True)}
  if platform() == 'tpu' and len(shapes) == 1:
    left, right, out = operands(equation)
    return jnp.einsum(f'z{left},z{right}->{out}', jnp.stack(xs), jnp.stack(ys), **f32)
  return functools.reduce(
    jnp.add, [jnp.einsum(equation, x, y, **f32) for x, y in zip(xs, ys, strict=True)]
  )


def total(equation: str, x: jax.Array) -> jax.Array:
  """Sums of x over some axes, float32; of numbers that bfloat16 has, such as ones and zeros.

  On TPU, matrix units add them, which round others first.

  Args:
    equation: einsum's, such as 'BTNS->NS'.
    x: to sum.
  """
  letters, out = equation.split('->')
  if platform() != 'tpu':
    return jnp.sum(x, axis=[i for i, c in enumerate(letters) if c not in out], dtype=jnp.float32)
  summed = [(c, size) for c, size in zip(letters, x.shape, strict=True) if c not in out]
  ones = jnp.ones((_TPU_ROWS, *(size for _, size in summed)), x.dtype)
  equation = f'z{"".join(c for c, _ in summed)},{letters}->z{out}'
  return jnp.einsum(equation, ones, x, preferred_element_type=jnp.float32)[0]


@functools.partial(jax.jit, static_argnames='axis', inline=True)
def roll(x: jax.Array, shift: jax.Array | int, axis: int) -> jax.Array:
  """`jnp.roll`, which is traced in a fraction of the time where the shift is traced."""
  # In here JAX has no operations to print, before it sees that the shift is none that it knows.
  return jnp.roll(x, shift, axis)


def shift_rows(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Moves the rows of x, each by its own number of columns.

  Args:
    x: [..., L, E].
    width: C, columns of the result.
    shift: of the last row, to the right; each row above moves by one column less.

  Returns:
    [..., L, C]; zero where no column of x comes.
  """
  function = _shift_rows if _in_training.value else _plain_shift_rows
  return function(x, width, shift)


def _plain_shift_rows(x, width, shift):
  # Slices are quick on CPU only: on TPU they become a loop over rows.
  shifts = {'cpu': _shift_by_slices, 'default': _shift_by_reshaping}
  shifts = {name: functools.partial(f, width=width, shift=shift) for name, f in shifts.items()}
  return jax.lax.platform_dependent(x, **shifts)


_shift_rows = jax.custom_vjp(_plain_shift_rows, nondiff_argnums=(1, 2))


def _shift_rows_fwd(x, width, shift):
  return _plain_shift_rows(x, width, shift), x.shape[-1]


def _shift_rows_bwd(width, shift, columns, g):
  # Moves every row back: the rows' shifts are reversed by reversing their order.
  back = _plain_shift_rows(jnp.flip(g, axis=-2), columns, g.shape[-2] - 1 - shift)
  return (jnp.flip(back, axis=-2),)


_shift_rows.defvjp(_shift_rows_fwd, _shift_rows_bwd)


def _shift_by_slices(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Row i is the slice from `L - 1 - i` of itself between zeros."""
  rows, columns = x.shape[-2:]
  left = rows - 1 + max(shift - (rows - 1), 0)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, max(width - columns, 0) + rows - 1)])
  start = left - shift + jnp.arange(rows)[::-1]

  def one_row(row, start):
    return jax.lax.dynamic_slice_in_dim(row, start, width, axis=-1)

  return jax.vmap(one_row, in_axes=(-2, 0), out_axes=-2)(x, start)


def _shift_by_reshaping(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Row after row, padded, is cut into rows that are shorter by one: row i moves right by i."""
  *outer, rows, columns = x.shape
  padded = columns + rows
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)]).reshape(*outer, -1)
  x = x[..., : rows * (padded - 1)].reshape(*outer, rows, padded - 1)
  left = shift - (rows - 1)
  sides = [(0, 0, 0)] * (x.ndim - 1) + [(left, width - left - (padded - 1), 0)]
  return jax.lax.pad(x, jnp.zeros([], x.dtype), sides)


def read_rows(*rows: jax.Array) -> list[jax.Array]:
  """Rows [..., V] of arrays that are then written in place: read once, before that, in float32.

  XLA writes into an array in place only where everything else that reads the array comes before.
  On CPU it would fuse the slice into each use of the row, some of them after the write, and drop an
  `optimization_barrier` too early to help; a product, here with the unit matrix, is computed once.
  Elsewhere a barrier does.
  """
  plain = [row.astype(jnp.float32) for row in rows]

  def on_cpu(*rows):
    stacked = jnp.stack(rows, axis=-2)
    unit = jnp.broadcast_to(jnp.eye(len(rows), dtype=jnp.float32), (*stacked.shape[:-1], len(rows)))
    read = jnp.einsum('...IJ,...JV->...IV', unit, stacked, precision=jax.lax.Precision.HIGHEST)
    return [read[..., i, :] for i in range(len(rows))]

  def elsewhere(*rows):
    return list(jax.lax.optimization_barrier(rows))

  return jax.lax.platform_dependent(*plain, cpu=on_cpu, default=elsewhere)


def depends_on(read: jax.Array, row: jax.Array) -> jax.Array:
  """The row, which XLA can't know, or write, without `read` of the same shape: see `read_rows`.

  Where `read` is NaN, so is the result on CPU.
  """
  return jax.lax.platform_dependent(
    read,
    row,
    cpu=lambda read, row: jnp.where(jnp.isnan(read), read.astype(row.dtype), row),
    default=lambda read, row: jax.lax.optimization_barrier((read, row))[1],
  )
