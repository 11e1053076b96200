"""What sublayers with softmax attention have in common: projections, relative positions, a gate."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers

from tvq_t5x.network import xla
from tvq_t5x.network.config import HeadType, Remat
from tvq_t5x.network.layers import (
  SEQUENCE_DROPOUT,
  Einsum,
  RMSNorm,
  rms_normalize,
  save_for_backward,
  silu,
  with_sharding_constraint,
)
from tvq_t5x.network.mixers import Aux, Call, Mixer, State
from tvq_t5x.network.positions import sinusoids

# The score of a key that is not attended.
MASKED = -1e30


def _identity(x: jax.Array) -> jax.Array:
  return x


@flax.struct.dataclass
class Values:
  """Values of keys, of which each reader may compute the activation where it reads them."""

  projected: jax.Array  # [B, T, N, V], or in another order.
  activation: Callable[[jax.Array], jax.Array] = flax.struct.field(
    pytree_node=False, default=_identity
  )

  @property
  def active(self) -> jax.Array:
    """What is averaged."""
    return self.activation(self.projected)

  def map(self, function: Callable[[jax.Array], jax.Array]) -> 'Values':
    """With what a function makes of the array, such as another order."""
    return Values(function(self.projected), self.activation)


class Queries(NamedTuple):
  """Queries with the learned biases of their two kinds of score, [B, T, N, G, K]."""

  content: jax.Array  # q + u, scored against keys.
  position: jax.Array  # q + w, scored against distances.


def distance_scores(queries: jax.Array, distances: jax.Array) -> jax.Array:
  """What distances add to the scores of queries.

  Args:
    queries: [..., N, G, L, K].
    distances: [C, N, K], whose products with the queries these are; or [C, N], the scores
      themselves, the same for all queries.

  Returns:
    [..., N, G, L, C] float32, or what broadcasts to that.
  """
  if distances.ndim == 2:
    scores = distances.T.astype(jnp.float32)[:, None, None]
    return jnp.broadcast_to(scores, (len(scores), 1, queries.shape[-2], scores.shape[-1]))
  return xla.einsum('BRNGLK,CNK->BRNGLC', queries, distances, jnp.float32)


def token_distance_scores(queries: jax.Array, distances: jax.Array) -> jax.Array:
  """`distance_scores` of single queries [B, N, G, K]: [B, N, G, C], or 1 for B and G."""
  if distances.ndim == 2:
    return distances.T.astype(jnp.float32)[None, :, None]
  f32 = {'preferred_element_type': jnp.float32}
  return jnp.einsum('BNGK,CNK->BNGC', queries, distances, **f32)


class Attention(Mixer):
  """An attention sublayer, gated or plain; subclasses say which keys are attended, and how."""

  KIND: ClassVar[str] = 'attention'
  SAVES_MARKED: ClassVar[bool] = True
  ENCODES: ClassVar[bool] = True

  def attend(
    self,
    queries: Queries,
    keys: jax.Array,
    values: Values,
    distances: jax.Array,
    state: State | None,
    call: Call,
  ) -> tuple[jax.Array, State, Aux]:
    """Attends from every position of a segment to all up to it; in an encoder, to all.

    Args:
      queries: of the segment, [B, T, N, G, K].
      keys: [B, T, N, K].
      values: of the keys, [B, T, N, V].
      distances: [M + 1, N, K], projected sinusoids; row d scores keys at distance d. In an encoder,
        [2M + 1, N, K]; row d scores keys at distance d - M, which is negative after the query.
      state: as `__call__` gets it.
      call: likewise.

    Returns:
      The values [B, T, N, G, V] averaged with softmax weights, and the rest of what `__call__`
      returns.
    """
    raise NotImplementedError

  @nn.compact
  def __call__(self, x: jax.Array, state: State | None, call: Call) -> tuple[jax.Array, State, Aux]:
    """[B, T, D] to the residual branch [B, T, D]; see `Mixer`."""
    c = self.config
    x = RMSNorm(name='norm')(x)
    queries, keys, values = self._queries_keys_values(x)
    out, state, aux = self.attend(queries, keys, values, self._distances(), state, call)
    d, h, v = c.emb_dim, c.num_heads, c.value_width
    heads = c.heads_axis(h)
    out = out.reshape(*out.shape[:2], h, v)
    if c.head_type == HeadType.GATED:
      gate = self._project(x, 'gate', v, h, heads, c.value_axis)
      if c.remat == Remat.LAYER:  # XLA would compute it again for each part of the product below.
        gate = xla.computed_once(gate)
      out = out * silu(gate)
    out = with_sharding_constraint(out, ('batch', 'length', heads, c.value_axis))
    out = Einsum(
      'BTHV,HVD->BTD', (h, v, d), (heads, c.value_axis, 'embed'), 2, dtype=c.dtype, name='out'
    )(out)
    return out, state, aux

  def _queries_keys_values(self, x: jax.Array) -> tuple[Queries, jax.Array, Values]:
    """[B, T, D] to queries, keys and values as `attend` gets them."""
    c = self.config
    n, g, h, k = c.num_kv_heads, c.queries_per_kv_head, c.num_heads, c.key_dim
    heads, kv_heads = c.heads_axis(h), c.heads_axis(n)
    q = self._scale * rms_normalize(self._project(x, 'query', k, h, heads, 'kv'))
    keys = self._scale * rms_normalize(self._project(x, 'key', k, n, kv_heads, 'kv'))
    values = self._project(x, 'value', c.value_width, n, kv_heads, c.value_axis)
    q = with_sharding_constraint(q, ('batch', 'length', heads, 'kv'))
    keys = with_sharding_constraint(keys, ('batch', 'length', kv_heads, 'kv'))
    values = with_sharding_constraint(values, ('batch', 'length', kv_heads, c.value_axis))
    values = Values(values, silu) if c.head_type == HeadType.GATED else Values(values)

    def biased(name):
      bias = nn_partitioning.param_with_axes(
        name, initializers.zeros, (h, k), jnp.float32, axes=(heads, 'kv')
      )
      return (q + self._scale * bias.astype(c.dtype)).reshape(*q.shape[:2], n, g, k)

    return Queries(biased('content_bias'), biased('position_bias')), keys, values

  def _distances(self) -> jax.Array:
    """The projected sinusoids of the distances of near keys, as `attend` gets them."""
    c = self.config
    n, d, k = c.num_kv_heads, c.emb_dim, c.key_dim
    first = -c.window_len if c.bidirectional else 0
    x = sinusoids(jnp.arange(first, c.window_len + 1), d, c.max_wavelength)
    if not self.deterministic and c.sinusoid_dropout_rate:
      share = 1.0 - c.sinusoid_dropout_rate
      kept = jax.random.bernoulli(self.make_rng(SEQUENCE_DROPOUT), jnp.float32(share), x.shape)
      x = jnp.where(kept, x / share, 0.0)
    axes = ('embed', c.heads_axis(n), 'kv')
    project = Einsum('CD,DNK->CNK', (d, n, k), axes, dtype=c.dtype, name='distance')
    return self._scale * project(x.astype(c.dtype))

  def _project(
    self, x: jax.Array, name: str, width: int, num_heads: int, heads_axis: str, width_axis: str
  ) -> jax.Array:
    """[B, T, D] to [B, T, heads, width]."""
    c = self.config
    shape, axes = (c.emb_dim, num_heads, width), ('embed', heads_axis, width_axis)
    return save_for_backward(Einsum('BTD,DHK->BTHK', shape, axes, dtype=c.dtype, name=name)(x))

  @property
  def _scale(self) -> float:
    return self.config.key_dim**-0.25
