"""A diagonal state-space layer (S4D): convolution over a segment, recurrence over its chunks.

Each channel has n modes, `x' = A x + B u`, `y = Re(C x) + d u`, whose conjugates are counted by a
factor of 2 in C (S4D, arXiv 2206.11893). All of it is computed in float32 and complex64.

Letters besides those of `config`: n modes of a channel, Q positions of a chunk.
"""

import enum
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers

from tvq_t5x.network import sequence, xla
from tvq_t5x.network.sequence import Part

# The time steps that channels start with, as S4D's.
_STEPS = (1e-3, 1e-1)


class Initialization(enum.StrEnum):
  """Of the modes `A_j = -exp(a_j) + i w_j` and of B."""

  LIN = 'lin'  # `exp(a) = 1/2, w_j = pi j, B = 1`
  INV = 'inv'  # `exp(a) = 1/2, w_j = (N / pi) (N / (2j + 1) - 1), B = 1`
  LEGS = 'legs'  # The modes of the normal part of HiPPO-LegS, and its B.
  REAL = 'real'  # `exp(a_j) = j + 1, w = 0, B = 1`


class SSM(nn.Module):
  """A state-space layer over D channels.

  Attributes:
    state_size: N real numbers of a channel's state: N / 2 complex modes, or N real ones.
    initialization: see `Initialization`; real modes are those of 'real'.
    complex_modes: whether modes oscillate.
    bidirectional: whether a second C looks ahead, from the next position on.
    chunk_len: Q, positions that are convolved at once; changes speed and memory, not values.
  """

  state_size: int = 64
  initialization: str = Initialization.LIN
  complex_modes: bool = True
  bidirectional: bool = False
  chunk_len: int = 1024

  @nn.compact
  def __call__(
    self,
    u: jax.Array,
    state: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Filters a segment.

    Args:
      u: [B, T, D], 0 on padding.
      state: [B, D, n, 2] float32, real and imaginary parts of the modes after the positions before;
        None at the start. Not for a bidirectional layer, whose segments are whole sequences.
      lengths: [B] int32, how many positions of each row the state after the segment is of; None
        means all T.

    Returns:
      [B, T, D] float32, and the state after the segment.
    """
    num_channels = u.shape[-1]
    u = u.astype(jnp.float32)
    modes = self._modes(num_channels)
    if self.bidirectional:
      if state is not None:
        raise ValueError('A bidirectional layer has no state.')
      return self._both_ways(u, modes), jnp.zeros([u.shape[0], num_channels, 0, 2])
    before = (
      jnp.zeros((u.shape[0], *modes.a.shape), jnp.complex64) if state is None else _join(state)
    )
    if sequence.num_parts(u.shape[1]) > 1:
      function = functools.partial(_filter_part, chunk_len=self.chunk_len)
      y, after = sequence.on_parts(function, u, (before, lengths), modes)
    else:
      y, after = filter_chunks(u, before, modes, self.chunk_len)
      if lengths is not None:
        after = state_after(u, before, modes, lengths)
    return y, _split(after)

  def _both_ways(self, u: jax.Array, modes: '_Modes') -> jax.Array:
    """One circular convolution of length 2T with what came before and what comes after."""
    length, ahead = u.shape[1], modes._replace(c=self._parameter_c('c2', u.shape[-1]))
    if sequence.num_parts(length) > 1:
      function = functools.partial(_filter_part_both_ways, chunk_len=self.chunk_len)
      return sequence.on_parts(function, u, (), (modes, ahead))[0]
    past, future = (_kernel(x.c * x.b, x.a, length) for x in (modes, ahead))
    # Entry 2T - 1 - j reaches j + 1 positions ahead.
    kernel = jnp.concatenate([past, jnp.flip(future, axis=-1)], axis=-1)
    return _convolve(u, kernel) + modes.d * u

  def _modes(self, num_channels: int) -> '_Modes':
    """Discretized by zero-order hold: `Ab = exp(dt A)`, `Bb = (Ab - 1) / A * B`."""
    start = _initial_modes(self.initialization, self.state_size, self.complex_modes)

    def parameter(name, init, *axes):
      return nn_partitioning.param_with_axes(
        name, init, (num_channels, *([len(start.a)] * len(axes))), jnp.float32, axes=('mlp', *axes)
      )

    def like(value):
      return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    low, high = np.log(_STEPS)
    log_dt = parameter(
      'log_dt', lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)
    )
    a = -jnp.exp(parameter('log_decay', like(start.a), 'modes'))
    b = parameter('b_re', like(np.real(start.b)), 'modes')
    if self.complex_modes:
      a = a + 1j * parameter('frequency', like(start.w), 'modes')
      b = b + 1j * parameter('b_im', like(np.imag(start.b)), 'modes')
    step = jnp.exp(log_dt)[:, None] * a
    return _Modes(
      a=step.astype(jnp.complex64),
      b=(jnp.expm1(step) / a * b).astype(jnp.complex64),
      c=self._parameter_c('c', num_channels),
      d=parameter('d', initializers.normal(1.0)),
    )

  def _parameter_c(self, name: str, num_channels: int) -> jax.Array:
    number = self.state_size // 2 if self.complex_modes else self.state_size

    def part(suffix):
      return nn_partitioning.param_with_axes(
        f'{name}_{suffix}',
        initializers.normal(0.5**0.5 if self.complex_modes else 1.0),
        (num_channels, number),
        jnp.float32,
        axes=('mlp', 'modes'),
      )

    # The conjugate modes add as much again.
    return 2 * (part('re') + 1j * part('im')) if self.complex_modes else part('re') + 0j


class _Modes(NamedTuple):
  """Of all channels, after a step: `x_t = exp(a) x_(t-1) + b u_t`, `y_t = Re(c x_t) + d u_t`."""

  a: jax.Array  # [D, n] complex64
  b: jax.Array  # [D, n] complex64
  c: jax.Array  # [D, n] complex64
  d: jax.Array  # [D] float32


class _InitialModes(NamedTuple):
  """Of one channel: `A = -exp(a) + i w`, and B."""

  a: np.ndarray
  w: np.ndarray
  b: np.ndarray


def filter_chunks(
  u: jax.Array, before: jax.Array, modes: _Modes, chunk_len: int
) -> tuple[jax.Array, jax.Array]:
  """Convolves chunk after chunk, with the state carried from each to the next.

  Args:
    u: [B, T, D] float32.
    before: [B, D, n] complex64, the state before.
    modes: of the layer.
    chunk_len: Q.

  Returns:
    [B, T, D] float32 and the state after.
  """
  length = u.shape[1]
  chunk_len = min(chunk_len, length)
  num_chunks = -(-length // chunk_len)
  kernel = _kernel(modes.c * modes.b, modes.a, chunk_len)
  kernel = jnp.pad(kernel, [(0, 0), (0, chunk_len)])
  powers = _powers(modes.a, chunk_len)  # exp(a t), [D, n, Q]
  rest = length - (num_chunks - 1) * chunk_len

  def step(x, chunk, number):
    y = _convolve(chunk, kernel) + modes.d * chunk
    # What came before is in all of it, once more decayed at each position.
    reads = modes.c * jnp.exp(modes.a) * x  # [B, D, n]
    y = y + jnp.einsum('BDn,Dnt->BtD', reads, powers).real
    after = jnp.exp(modes.a * number) * x + _absorb(chunk[:, :number], modes, powers)
    return after, y

  x, parts = before, []
  if num_chunks > 1:
    whole = u[:, : (num_chunks - 1) * chunk_len]
    whole = jnp.moveaxis(whole.reshape(u.shape[0], -1, chunk_len, u.shape[-1]), 1, 0)
    x, y = jax.lax.scan(lambda x, chunk: step(x, chunk, chunk_len), x, whole)
    parts.append(jnp.moveaxis(y, 0, 1).reshape(u.shape[0], -1, u.shape[-1]))
  last = jnp.pad(u[:, length - rest :], [(0, 0), (0, chunk_len - rest), (0, 0)])
  x, y = step(x, last, rest)
  return jnp.concatenate([*parts, y[:, :rest]], axis=1), x


def _filter_part(
  part: Part,
  u: jax.Array,
  states: tuple[jax.Array, jax.Array | None],
  modes: _Modes,
  chunk_len: int,
) -> tuple[jax.Array, jax.Array]:
  """One part of sequences that devices share; the states are those before the whole sequences."""
  before, lengths = states
  owner, lengths = part.ends(lengths, u.shape[1])
  before = _state_before(part, u, before, modes, chunk_len)
  y, after = filter_chunks(u, before, modes, chunk_len)
  if lengths is not None:
    after = state_after(u, before, modes, lengths)
  return y, part.of_owner(owner, after)


def _filter_part_both_ways(
  part: Part, u: jax.Array, states: tuple[()], shared: tuple[_Modes, _Modes], chunk_len: int
) -> tuple[jax.Array, tuple[()]]:
  """One part of sequences that devices share, with the modes that look back and ahead."""
  del states
  modes, ahead = shared
  empty = jnp.zeros((u.shape[0], *modes.a.shape), jnp.complex64)
  before = _state_before(part, u, empty, modes, chunk_len)
  past, _ = filter_chunks(u, before, modes, chunk_len)
  u = jnp.flip(u, axis=1)
  after = _state_before(part.mirrored, u, empty, ahead, chunk_len)
  ahead = ahead._replace(d=jnp.zeros_like(ahead.d))
  future, _ = filter_chunks(u, after, ahead, chunk_len)
  # From the next position on: each has what the one after it reads.
  of_next = jnp.einsum('BDn,Dn->BD', after, ahead.c).real[:, None]
  future = jnp.concatenate([of_next, future[:, :-1]], axis=1)
  return past + jnp.flip(future, axis=1), ()


def _state_before(
  part: Part, u: jax.Array, first: jax.Array, modes: _Modes, chunk_len: int
) -> jax.Array:
  """The state [B, D, n] before a part, of which `first` is that before the first one."""
  length = u.shape[1]

  def merge(old, new, num_parts):
    return jnp.exp(modes.a * (length * num_parts)) * old + new

  return part.before_each(first, _absorb_chunks(u, modes, chunk_len), merge)


def _absorb_chunks(u: jax.Array, modes: _Modes, chunk_len: int) -> jax.Array:
  """The state [B, D, n] after the positions of u [B, T, D] alone."""
  chunk_len = min(chunk_len, u.shape[1])
  u = jnp.pad(u, [(0, 0), (-u.shape[1] % chunk_len, 0), (0, 0)])
  chunks = jnp.moveaxis(u.reshape(u.shape[0], -1, chunk_len, u.shape[-1]), 1, 0)
  powers, decay = _powers(modes.a, chunk_len), jnp.exp(modes.a * chunk_len)

  def step(x, chunk):
    return decay * x + _absorb(chunk, modes, powers), None

  empty = jnp.zeros((u.shape[0], *modes.a.shape), jnp.complex64)
  return jax.lax.scan(step, empty, chunks)[0]


def state_after(u: jax.Array, before: jax.Array, modes: _Modes, lengths: jax.Array) -> jax.Array:
  """The state [B, D, n] after the first `lengths` [B] positions of u [B, T, D]."""
  length = u.shape[1]

  def row(u, x, number):
    # The positions that count come last, as all do where all count.
    u = xla.roll(jnp.where(jnp.arange(length)[:, None] < number, u, 0), length - number, axis=0)
    powers = _powers(modes.a, length)
    return jnp.exp(modes.a * number) * x + _absorb(u[None], modes, powers)[0]

  return jax.vmap(row)(u, before, lengths)


def _absorb(u: jax.Array, modes: _Modes, powers: jax.Array) -> jax.Array:
  """What the positions of u [B, T, D] add to the state after them, [B, D, n]."""
  decayed = jnp.flip(powers[..., : u.shape[1]], axis=-1)
  return modes.b * jnp.einsum('BtD,Dnt->BDn', u.astype(jnp.complex64), decayed)


def _kernel(weights: jax.Array, a: jax.Array, length: int) -> jax.Array:
  """`Re sum_n weights_n exp(a_n t)` for t < T, [D, T] float32."""
  return jnp.einsum('Dn,Dnt->Dt', weights, _powers(a, length)).real


def _powers(a: jax.Array, length: int) -> jax.Array:
  return jnp.exp(a[..., None] * jnp.arange(length))


def _convolve(u: jax.Array, kernel: jax.Array) -> jax.Array:
  """Circular convolution of u [B, T, D], padded to the kernel's length, with it [D, 2T]."""
  size = kernel.shape[-1]
  spectrum = jnp.fft.rfft(u, size, axis=1) * jnp.fft.rfft(kernel, axis=-1).T
  return jnp.fft.irfft(spectrum, size, axis=1)[:, : u.shape[1]]


def _join(parts: jax.Array) -> jax.Array:
  return jax.lax.complex(parts[..., 0], parts[..., 1])


def _split(x: jax.Array) -> jax.Array:
  return jnp.stack([x.real, x.imag], axis=-1)


def _initial_modes(kind: str, state_size: int, complex_modes: bool) -> _InitialModes:
  number = state_size // 2 if complex_modes else state_size
  j = np.arange(number)
  half, one, zero = np.full(number, np.log(0.5)), np.ones(number, complex), np.zeros(number)
  if not complex_modes or kind == Initialization.REAL:
    return _InitialModes(np.log(j + 1.0), zero, one)
  if kind == Initialization.LIN:
    return _InitialModes(half, np.pi * j, one)
  if kind == Initialization.INV:
    return _InitialModes(half, state_size / np.pi * (state_size / (2 * j + 1) - 1), one)
  return _legs(state_size)


def _legs(state_size: int) -> _InitialModes:
  """The modes of `A = S - 1/2 - p p^T` without its part of low rank, where S is skew (S4D, 3)."""
  n = np.arange(state_size)
  p = np.sqrt(n + 0.5)
  root = np.sqrt(2 * n + 1)
  a = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
  normal = a + np.outer(p, p)  # -1/2 and a skew matrix.
  w, vectors = np.linalg.eigh(-1j * (normal + 0.5 * np.eye(state_size)))
  positive = w > 0
  b = vectors.conj().T @ p
  return _InitialModes(np.full(state_size // 2, np.log(0.5)), w[positive], b[positive])
