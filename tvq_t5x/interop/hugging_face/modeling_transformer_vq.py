"""Transformer-VQ and LongVQ in PyTorch: scores texts, and writes them with `generate`.

Instead of a cache of all keys and values there is a state whose size does not depend on how many
tokens came before. Segments are read a block at a time, so that memory does not grow either. For
inference: keys pass no gradient, and no statistics of the codebooks are gathered.

Letters: B batch, T tokens, L block, M window, N key/value heads, G query heads per key/value head,
H = N G query heads, D model width, K key width, V value width, S codes, W vocabulary, F width of an
MLP; of a state-space layer n modes. Papers: Transformer-VQ (arXiv 2309.16354), LongVQ (2404.11163).
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_transformer_vq import TransformerVQConfig

MASKED = -1e30
MIN_COUNT = 0.01
NORM_EPSILON = 1e-6


class AttentionState(NamedTuple):
  """What an attention sublayer remembers of the positions before a block."""

  keys: Tensor  # [B, M, N, K], the last M keys, quantized ones of 'vq'
  values: Tensor  # [B, M, N, V]
  # Of 'vq' only. Older positions are kept as how many had a code, and the mean of their values.
  codes: Tensor | None  # [B, M, N]; S where the slot is empty
  counts: Tensor | None  # [B, N, S] float32
  means: Tensor | None  # [B, N, S, V] float32


class LongVQState(NamedTuple):
  """What a LongVQ sublayer remembers; None in the place of a part that it lacks."""

  ssm: Tensor | None  # [B, D, n] complex64
  attention: AttentionState | None


class TransformerVQState(NamedTuple):
  """All that the model remembers of B sequences."""

  position: Tensor  # [B], how many tokens came before
  layers: tuple[tuple[Any, ...], ...]  # A state, or None, of each sublayer of each layer.
  # Of each sublayer that has them: projected sinusoids of the distances, which follow from the
  # parameters. [M + 1, N, K]
  distances: tuple[tuple[Tensor | None, ...], ...]

  def select(self, rows: Tensor) -> 'TransformerVQState':
    """The sequences with these numbers [B'], which may repeat."""
    return self._replace(position=self.position[rows], layers=_select(self.layers, rows))


def _select(x: Any, rows: Tensor) -> Any:
  if isinstance(x, Tensor):
    return x[rows]
  if isinstance(x, tuple):
    parts = (_select(part, rows) for part in x)
    return type(x)(*parts) if hasattr(x, '_fields') else tuple(parts)
  return x


class Call(NamedTuple):
  """What every sublayer is told of a block."""

  position: Tensor  # [B], of its first token
  lengths: Tensor  # [B], how many of the L tokens of each row count


@dataclasses.dataclass
class TransformerVQOutput(ModelOutput):
  """What the model returns.

  Attributes:
    loss: mean cross entropy in nats, where there are labels.
    logits: [B, T, W] float32.
    state: after the tokens, where it was asked for.
  """

  loss: Tensor | None = None
  logits: Tensor | None = None
  state: TransformerVQState | None = None


def _parameter(*shape: int) -> nn.Parameter:
  return nn.Parameter(torch.empty(shape))


def rms_normalize(x: Tensor) -> Tensor:
  """`x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32."""
  y = x.float()
  return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPSILON)).to(x.dtype)


def sinusoids(positions: Tensor, width: int, max_wavelength: float) -> Tensor:
  """`[sin | cos]` of positions [...], [..., width] float32."""
  exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
  angles = positions[..., None].float() / max_wavelength**exponents
  return torch.cat([angles.sin(), angles.cos()], dim=-1)


def last_of(x: Tensor, number: int, lengths: Tensor) -> Tensor:
  """The last `number` positions of the first `number + lengths` of x [B, J, ...]."""
  index = lengths[:, None] + torch.arange(number, device=x.device)
  return x[torch.arange(len(x), device=x.device)[:, None], index]


class RMSNorm(nn.Module):
  """RMS normalization with gain and bias."""

  def __init__(self, width: int):
    super().__init__()
    self.scale, self.bias = _parameter(width), _parameter(width)

  def forward(self, x: Tensor) -> Tensor:
    """[..., D] to [..., D]."""
    return rms_normalize(x) * self.scale.to(x.dtype) + self.bias.to(x.dtype)


class Einsum(nn.Module):
  """A projection: a kernel, of whose axes the first `num_in` are the fan-in, perhaps a bias."""

  def __init__(self, equation: str, shape: tuple[int, ...], num_in: int = 1, bias: bool = False):
    super().__init__()
    self.equation = equation
    self.kernel = _parameter(*shape)
    self.bias = _parameter(*shape[num_in:]) if bias else None

  def forward(self, x: Tensor) -> Tensor:
    """Applies the equation."""
    y = torch.einsum(self.equation, x, self.kernel.to(x.dtype))
    return y if self.bias is None else y + self.bias.to(x.dtype)


class VectorQuantizer(nn.Module):
  """A codebook for each key head: averaged sums of keys over averaged counts, float32."""

  def __init__(self, h: dict[str, Any]):
    super().__init__()
    n, s, k = num_kv_heads(h), h['num_codes'], h['key_dim']
    self.c_sum, self.c_count = _parameter(n, s, k), _parameter(n, s)

  def codebook(self) -> Tensor:
    """[N, S, K]."""
    return self.c_sum.float() / self.c_count.float().clamp(min=MIN_COUNT)[..., None]

  def forward(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes' numbers [B, L, N] of keys [B, L, N, K], quantized keys, and [N, S, K]."""
    codebook = self.codebook()
    products = torch.einsum('BLNK,NSK->BLNS', keys.float(), codebook)
    codes = (products - codebook.square().sum(-1) / 2).argmax(-1)
    quantized = codebook[torch.arange(len(codebook), device=codes.device), codes]
    return codes, quantized.to(keys.dtype), codebook.to(keys.dtype)


class SoftmaxAttention:
  """Softmax attention of a block to itself, to a window before it and, of 'vq', to all before.

  'quadratic' attends to keys as they are, and to the last `kv_cache_len` positions only.
  """

  def __init__(self, h: dict[str, Any], kind: str):
    self.h, self.is_vq = h, kind == 'vq'
    self.window_len = h['window_len'] if self.is_vq else h['kv_cache_len']

  def init_state(self, batch_size: int, like: Tensor) -> AttentionState:
    """No positions; `like` has the device and the dtype."""
    h, n, m = self.h, num_kv_heads(self.h), self.window_len
    s, v = h['num_codes'], h['value_dim']
    keys = like.new_zeros(batch_size, m, n, h['key_dim'])
    values = like.new_zeros(batch_size, m, n, v)
    if not self.is_vq:
      return AttentionState(keys, values, None, None, None)
    codes = torch.full([batch_size, m, n], s, device=like.device)
    counts = torch.zeros([batch_size, n, s], device=like.device)
    means = torch.zeros([batch_size, n, s, v], device=like.device)
    return AttentionState(keys, values, codes, counts, means)

  def __call__(
    self,
    quantizer: VectorQuantizer | None,
    queries: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    state: AttentionState,
    call: Call,
  ) -> tuple[Tensor, AttentionState]:
    """Attends.

    Args:
      quantizer: of the keys, for 'vq'.
      queries: [B, L, N, G, K] twice: those scored against keys and those against distances.
      keys: [B, L, N, K].
      values: [B, L, N, V].
      distances: [M + 1, N, K], or scores [M + 1, N]; row d is of keys at distance d.
      state: of the positions before.
      call: see `Call`.

    Returns:
      [B, L, N, G, V], and the state after the block.
    """
    codes = codebook = None
    if quantizer is not None:
      codes, keys, codebook = quantizer(keys)
    all_keys = torch.cat([state.keys, keys], dim=1)
    all_values = torch.cat([state.values, values], dim=1)
    content, by_distance = (x.float() for x in queries)
    scores = torch.einsum('BLNGK,BJNK->BNGLJ', content, all_keys.float())
    scores = scores + self._nearness(by_distance, distances, all_keys.shape[1])
    scores = scores.masked_fill(~self._visible(content.shape[1], call.position), MASKED)
    num_near = scores.shape[-1]
    if codebook is not None and self.h['compressed_cache']:
      assert state.counts is not None
      far = torch.einsum('BLNGK,NSK->BNGLS', content, codebook.float())
      counts = torch.where(state.counts > 0, state.counts.clamp(min=1).log(), MASKED)
      scores = torch.cat([scores, far + counts[:, :, None, None]], dim=-1)
    weights = scores.softmax(-1)
    out = torch.einsum('BNGLJ,BJNV->BLNGV', weights[..., :num_near], all_values.float())
    if scores.shape[-1] > num_near:
      out = out + torch.einsum('BNGLS,BNSV->BLNGV', weights[..., num_near:], state.means)
    after = self._after(state, codes, all_keys, all_values, call.lengths)
    return out.to(values.dtype), after

  def _nearness(self, queries: Tensor, distances: Tensor, num_keys: int) -> Tensor:
    """What distances add to scores, [B, N, G, L, J] or 1 for B and G; 0 at those over M."""
    length, reach = queries.shape[1], len(distances) - 1
    if distances.ndim == 2:
      scores = distances.T.float()[None, :, None, None].expand(-1, -1, -1, length, -1)
    else:
      scores = torch.einsum('BLNGK,CNK->BNGLC', queries, distances.float())
    distance = self._distance(length, num_keys, queries.device)
    index = distance.clamp(0, reach).expand(*scores.shape[:3], -1, -1)
    return scores.gather(-1, index).masked_fill(distance > reach, 0.0)

  def _visible(self, length: int, position: Tensor) -> Tensor:
    """Which keys a query may attend to, [B, 1, 1, L, J]."""
    num_keys = self.window_len + length
    distance = self._distance(length, num_keys, position.device)
    visible = distance >= 0
    if self.is_vq and not self.h['compressed_cache']:
      visible = visible & (distance <= self.window_len)
    empty = (self.window_len - position).clamp(min=0)
    filled = torch.arange(num_keys, device=position.device) >= empty[:, None]
    return visible & filled[:, None, None, None]

  @staticmethod
  def _distance(length: int, num_keys: int, device: torch.device) -> Tensor:
    """How far key j is behind query i, [L, J]; the last key is at the last query's position."""
    query = torch.arange(num_keys - length, num_keys, device=device)
    return query[:, None] - torch.arange(num_keys, device=device)

  def _after(
    self,
    state: AttentionState,
    codes: Tensor | None,
    all_keys: Tensor,
    all_values: Tensor,
    lengths: Tensor,
  ) -> AttentionState:
    m = self.window_len
    window = last_of(all_keys, m, lengths), last_of(all_values, m, lengths)
    if codes is None:
      return AttentionState(*window, None, None, None)
    all_codes = torch.cat([state.codes, codes], dim=1)
    length, s = codes.shape[1], self.h['num_codes']
    # The first positions leave the window, and are added to the counts and means of their codes.
    leave = torch.arange(length, device=codes.device) < lengths[:, None]
    leaving = torch.where(leave[..., None], all_codes[:, :length], s)
    one_hot = F.one_hot(leaving, s + 1)[..., :s].float()  # [B, L, N, S]
    counts = state.counts + one_hot.sum(1)
    sums = torch.einsum('BLNS,BLNV->BNSV', one_hot, all_values[:, :length].float())
    share = (state.counts / counts.clamp(min=1))[..., None]
    means = share * state.means + sums / counts.clamp(min=1)[..., None]
    return AttentionState(*window, last_of(all_codes, m, lengths), counts, means)


class Attention(nn.Module):
  """Transformer-VQ's attention sublayer, gated (SHGA) or plain (MHA, MQA)."""

  def __init__(self, h: dict[str, Any], kind: str):
    super().__init__()
    self.h, self.gated = h, h['head_type'] == 'gated'
    d, n, q, k, v = h['emb_dim'], num_kv_heads(h), h['num_heads'], h['key_dim'], h['value_dim']
    self.norm = RMSNorm(d)
    self.query = Einsum('BLD,DHK->BLHK', (d, q, k))
    self.key = Einsum('BLD,DNK->BLNK', (d, n, k))
    self.value = Einsum('BLD,DNV->BLNV', (d, n, v))
    self.gate = Einsum('BLD,DHV->BLHV', (d, q, v)) if self.gated else None
    self.distance = Einsum('CD,DNK->CNK', (d, n, k))
    self.content_bias, self.position_bias = _parameter(q, k), _parameter(q, k)
    self.out = Einsum('BLHV,HVD->BLD', (q, v, d), 2)
    self.quantizer = VectorQuantizer(h) if kind == 'vq' else None
    self.attend = SoftmaxAttention(h, kind)

  def init_state(self, batch_size: int, like: Tensor) -> AttentionState:
    """No positions."""
    return self.attend.init_state(batch_size, like)

  def distances(self) -> Tensor:
    """Projected sinusoids of the distances 0 to M, [M + 1, N, K]."""
    h, kernel = self.h, self.distance.kernel
    x = torch.arange(h['window_len'] + 1, device=kernel.device)
    x = sinusoids(x, h['emb_dim'], h['max_wavelength']).to(self.out.kernel.dtype)
    return h['key_dim'] ** -0.25 * self.distance(x)

  def forward(
    self, x: Tensor, state: AttentionState, distances: Tensor, call: Call
  ) -> tuple[Tensor, AttentionState]:
    """[B, L, D] to the residual branch [B, L, D], and the state after the block."""
    scale, n = self.h['key_dim'] ** -0.25, num_kv_heads(self.h)
    x = self.norm(x)
    q, keys = scale * rms_normalize(self.query(x)), scale * rms_normalize(self.key(x))
    values = self.value(x)
    values = F.silu(values) if self.gated else values
    biases = (scale * bias.to(x.dtype) for bias in (self.content_bias, self.position_bias))
    queries = tuple((q + bias).unflatten(2, (n, -1)) for bias in biases)
    out, state = self.attend(self.quantizer, queries, keys, values, distances, state, call)
    out = out.flatten(2, 3)
    if self.gate is not None:
      out = out * F.silu(self.gate(x))
    return self.out(out), state


class MLP(nn.Module):
  """Two projections with an activation between them."""

  def __init__(self, h: dict[str, Any]):
    super().__init__()
    d = h['emb_dim']
    f = h['mlp_dim'] or d * (5 if h['head_type'] == 'mqa' else 4)
    self.activate = {'silu': F.silu, 'squared_relu': lambda x: F.relu(x).square()}[
      h['mlp_activation']
    ]
    self.norm = RMSNorm(d)
    self.wi, self.wo = Einsum('BLD,DF->BLF', (d, f)), Einsum('BLF,FD->BLD', (f, d))

  def init_state(self, batch_size: int, like: Tensor) -> None:
    """It remembers nothing."""

  def distances(self) -> None:
    """It has none."""

  def forward(self, x: Tensor, state: None, distances: None, call: Call) -> tuple[Tensor, None]:
    """[B, L, D] to the residual branch [B, L, D]."""
    return self.wo(self.activate(self.wi(self.norm(x)))), None


class SSM(nn.Module):
  """A diagonal state-space layer (S4D, arXiv 2206.11893) over D channels, in float32."""

  def __init__(self, num_channels: int, state_size: int, complex_modes: bool):
    super().__init__()
    shape = num_channels, state_size // 2 if complex_modes else state_size
    self.complex_modes = complex_modes
    self.log_dt, self.d = _parameter(num_channels), _parameter(num_channels)
    for name in ('log_decay', 'b_re', 'c_re'):
      self.register_parameter(name, _parameter(*shape))
    for name in ('frequency', 'b_im', 'c_im'):
      self.register_parameter(name, _parameter(*shape) if complex_modes else None)

  def init_state(self, batch_size: int) -> Tensor:
    """No positions."""
    shape = batch_size, *self.log_decay.shape
    return torch.zeros(shape, dtype=torch.complex64, device=self.log_decay.device)

  def _modes(self) -> tuple[Tensor, Tensor, Tensor]:
    """After a step, `x_t = exp(a) x_(t-1) + b u_t` and `y_t = Re(c x_t)`: a, b and c [D, n]."""

    def join(real: Tensor, imaginary: Tensor | None) -> Tensor:
      real = real.float()
      return torch.complex(real, torch.zeros_like(real) if imaginary is None else imaginary.float())

    a = join(-self.log_decay.float().exp(), self.frequency)
    step = self.log_dt.float().exp()[:, None] * a
    # exp(step) - 1, which loses no digits for small steps.
    grown, half = torch.expm1(step.real), torch.sin(step.imag / 2)
    minus_one = torch.complex(
      grown * step.imag.cos() - 2 * half.square(), step.real.exp() * step.imag.sin()
    )
    c = (2 if self.complex_modes else 1) * join(self.c_re, self.c_im)
    return step, minus_one / a * join(self.b_re, self.b_im), c

  def forward(self, u: Tensor, before: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L, D] to [B, L, D] float32, and the state [B, D, n] after `lengths` [B] positions."""
    a, b, c = self._modes()
    u, length = u.float(), u.shape[1]
    times = torch.arange(length + 1, device=u.device)
    powers = torch.exp(a[..., None] * times)  # [D, n, L + 1]
    kernel = torch.einsum('Dn,Dnt->tD', c * b, powers[..., :-1]).real
    size = 2 * length
    spectrum = torch.fft.rfft(u, size, dim=1) * torch.fft.rfft(kernel, size, dim=0)
    y = torch.fft.irfft(spectrum, size, dim=1)[:, :length] + self.d.float() * u
    y = y + torch.einsum('BDn,Dnt->BtD', c * before, powers[..., 1:]).real
    # The positions that count come last.
    index = times[:-1] - (length - lengths[:, None])
    rows = torch.arange(len(u), device=u.device)[:, None]
    last = torch.where(index[..., None] >= 0, u[rows, index.clamp(min=0)], 0.0)
    added = torch.einsum('BtD,Dnt->BDn', last.to(powers.dtype), powers[..., :-1].flip(-1))
    return y, torch.exp(a * lengths[:, None, None]) * before + b * added


class LongVQ(nn.Module):
  """LongVQ's gated block: attention to quantized keys, with a state-space layer inside."""

  def __init__(
    self,
    h: dict[str, Any],
    use_ssm: bool = True,
    attention: str = 'vq',
    bidirectional: bool = False,
    state_size: int = 64,
    complex_modes: bool = True,
    **of_training: Any,
  ):
    super().__init__()
    if bidirectional:
      raise ValueError('A bidirectional LongVQ block reads whole sequences and writes none.')
    self.h = h
    d, n, k, v = h['emb_dim'], h['num_heads'], h['key_dim'], h['value_dim']
    self.norm = RMSNorm(d)
    self.ssm = SSM(d, state_size, complex_modes) if use_ssm else None
    for name in ('candidate', 'update'):
      self.add_module(name, Einsum('BLD,DE->BLE', (d, d), bias=True))
    self.attend = None if attention == 'none' else SoftmaxAttention(h, attention)
    if self.attend is None:
      return
    for name, width in (('shared', k), ('value', v), ('reset', v)):
      self.add_module(name, Einsum('BLD,DNK->BLNK', (d, n, width), bias=True))
    for name in ('query_scale', 'query_shift', 'key_scale', 'key_shift'):
      self.register_parameter(name, _parameter(n, k))
    self.window_bias = _parameter(n, h['window_len'] + 1)
    self.out = Einsum('BLNV,NVD->BLD', (n, v, d), 2)
    self.quantizer = VectorQuantizer(h) if attention == 'vq' else None

  def init_state(self, batch_size: int, like: Tensor) -> LongVQState:
    """No positions."""
    return LongVQState(
      None if self.ssm is None else self.ssm.init_state(batch_size),
      None if self.attend is None else self.attend.init_state(batch_size, like),
    )

  def distances(self) -> None:
    """Scores of distances are a parameter."""

  def forward(
    self, x: Tensor, state: LongVQState, distances: None, call: Call
  ) -> tuple[Tensor, LongVQState]:
    """[B, L, D] to the residual branch [B, L, D], and the state after the block."""
    normed, after = self.norm(x), LongVQState(None, None)
    g = normed
    if self.ssm is not None:
      g, ssm = self.ssm(normed, state.ssm, call.lengths)
      after = after._replace(ssm=ssm)
    g = F.silu(g).to(x.dtype)
    candidate = self.candidate(g)
    if self.attend is not None:
      out, attention = self._attend(normed, g, state.attention, call)
      candidate, after = candidate + out, after._replace(attention=attention)
    return torch.sigmoid(self.update(g)) * (F.silu(candidate) - x), after

  def _attend(
    self, x: Tensor, g: Tensor, state: AttentionState, call: Call
  ) -> tuple[Tensor, AttentionState]:
    z = F.silu(self.shared(g))

    def affine(scale: Tensor, shift: Tensor) -> Tensor:
      y = rms_normalize(scale.to(z.dtype) * z + shift.to(z.dtype))
      return self.h['key_dim'] ** -0.25 * y

    q = affine(self.query_scale, self.query_shift)[:, :, :, None]
    keys, values = affine(self.key_scale, self.key_shift), F.silu(self.value(x))
    bias = self.window_bias.T
    assert self.attend is not None
    out, after = self.attend(self.quantizer, (q, q), keys, values, bias, state, call)
    return self.out(F.silu(self.reset(g)) * out[:, :, :, 0]), after


def num_kv_heads(h: dict[str, Any]) -> int:
  """N, heads of keys, values and codebooks."""
  return 1 if h['head_type'] == 'mqa' else h['num_heads']


class Layer(nn.Module):
  """The sublayers of a layer, each with a residual connection."""

  def __init__(self, h: dict[str, Any]):
    super().__init__()
    counts: dict[str, int] = {}
    for sublayer in h['sublayers']:
      ((kind, settings),) = sublayer.items() if isinstance(sublayer, dict) else [(sublayer, {})]
      name, make = {
        'vq': ('attention', Attention),
        'quadratic': ('attention', Attention),
        'mlp': ('mlp', MLP),
        'longvq': ('longvq', LongVQ),
      }[kind]
      number = counts[name] = counts.get(name, -1) + 1
      module = make(h, kind) if make is Attention else make(h, **settings)
      self.add_module(name if (name, number) == ('mlp', 0) else f'{name}_{number}', module)

  def forward(
    self, x: Tensor, states: tuple[Any, ...], distances: tuple[Any, ...], call: Call
  ) -> tuple[Tensor, tuple[Any, ...]]:
    """[B, L, D] to [B, L, D], and the states after the block."""
    after = []
    for module, state, of_module in zip(self.children(), states, distances, strict=True):
      branch, new = module(x, state, of_module, call)
      x, after = x + branch, [*after, new]
    return x, tuple(after)


class Embedding(nn.Module):
  """The table [W, D] of token embeddings."""

  def __init__(self, num_tokens: int, width: int):
    super().__init__()
    self.embedding = _parameter(num_tokens, width)


class Logits(nn.Module):
  """The output projection, in float32."""

  def __init__(self, h: dict[str, Any]):
    super().__init__()
    self.scale = h['logit_scale']
    shape = h['emb_dim'], h['vocab_size']
    self.dense = None if h['tied_embeddings'] else Einsum('BLD,DW->BLW', shape)
    self.bias = _parameter(h['vocab_size'])

  def forward(self, x: Tensor, table: Tensor) -> Tensor:
    """[B, L, D] to [B, L, W] float32; the table [W, D] is the kernel if embeddings are tied."""
    x = x.float()
    y = x @ table.float().T if self.dense is None else self.dense(x)
    return (y + self.bias.float()) * self.scale


class TransformerVQForCausalLM(PreTrainedModel, GenerationMixin):
  """The language model.

  `generate` works as for any model, in time and memory that do not grow with what came before, and
  continues from a `state` that a call returned. The token before the first one of a document is 1.
  """

  config_class = TransformerVQConfig
  main_input_name = 'input_ids'
  # As in training, whatever the dtype of activations.
  _keep_in_fp32_modules_strict = [
    'quantizer', 'ssm', 'window_bias', 'token_embedder', 'logits', 'position_scale',
  ]  # fmt: skip
  _supports_attention_backend = False
  # State, not cache: what `generate` offers for keys and values does not apply.
  _is_stateful = True

  def __init__(self, config: TransformerVQConfig):
    super().__init__(config)
    h = self.h = config.hyperparameters
    self.token_embedder = Embedding(h['vocab_size'], h['emb_dim'])
    self.position_scale = _parameter() if h['absolute_positions'] else None
    self.layers = nn.ModuleList(Layer(h) for _ in range(h['num_layers']))
    self.final_norm = RMSNorm(h['emb_dim']) if h['final_norm'] else None
    self.logits = Logits(h)
    self.post_init()

  def init_state(self, batch_size: int) -> TransformerVQState:
    """The state before the first token of B sequences."""
    like = next(p for name, p in self.layers.named_parameters() if name.endswith('kernel'))
    layers = [list(layer.children()) for layer in self.layers]
    return TransformerVQState(
      torch.zeros([batch_size], dtype=torch.long, device=like.device),
      tuple(tuple(x.init_state(batch_size, like) for x in layer) for layer in layers),
      tuple(tuple(x.distances() for x in layer) for layer in layers),
    )

  def forward(
    self,
    input_ids: Tensor,
    state: TransformerVQState | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int = 0,
    use_cache: bool | None = None,
    **unused: Any,
  ) -> TransformerVQOutput:
    """Reads a segment of each sequence.

    Args:
      input_ids: [B, T].
      state: of the tokens before; None at the start.
      attention_mask: [B, T], 0 on padding, which stands at the left or at the right of a row. Its
        logits mean nothing. Of a longer one the last T columns count.
      labels: [B, T], the tokens themselves, as of other models: each is predicted from those
        before it, and -100 is left out.
      logits_to_keep: how many of the last positions' logits are wanted; 0 means all.
      use_cache: whether the state is returned; None means that it is.

    Returns:
      See `TransformerVQOutput`.
    """
    batch_size, length = input_ids.shape
    first, lengths = _padding(attention_mask, input_ids)
    state = self.init_state(batch_size) if state is None else state
    # Padding to the right, where a block ends before it.
    order = (torch.arange(length, device=input_ids.device) + first[:, None]) % max(length, 1)
    hidden = []
    for start in range(0, length, self.h['block_len']):
      block = input_ids.gather(1, order)[:, start : start + self.h['block_len']]
      given = (lengths - start).clamp(0, block.shape[1])
      x, state = self._block(block, state, given)
      hidden.append(x)
    x = torch.cat(hidden, dim=1)
    back = (torch.arange(length, device=input_ids.device) - first[:, None]) % max(length, 1)
    x = x.gather(1, back[..., None].expand_as(x))[:, -logits_to_keep:]
    logits = self.logits(x, self.token_embedder.embedding)
    loss = None if labels is None else F.cross_entropy(
      logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )  # fmt: skip
    return TransformerVQOutput(loss, logits, None if use_cache is False else state)

  def _block(
    self, tokens: Tensor, state: TransformerVQState, lengths: Tensor
  ) -> tuple[Tensor, TransformerVQState]:
    """Tokens [B, L] to [B, L, D] before the logits, and the state after `lengths` [B] of them."""
    h, call = self.h, Call(state.position, lengths)
    x = self.token_embedder.embedding[tokens]
    x = x.to(next(p.dtype for n, p in self.layers.named_parameters() if n.endswith('kernel')))
    if self.position_scale is not None:
      positions = state.position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
      sines = sinusoids(positions, h['emb_dim'], h['max_wavelength'])
      x = x + (self.position_scale.float() * sines).to(x.dtype)
    layers = []
    for layer, before, distances in zip(self.layers, state.layers, state.distances, strict=True):
      x, after = layer(x, before, distances, call)
      layers.append(after)
    if self.final_norm is not None:
      x = self.final_norm(x)
    return x, TransformerVQState(state.position + lengths, tuple(layers), state.distances)

  def get_input_embeddings(self) -> nn.Module:
    """The token embeddings."""
    return self.token_embedder

  def prepare_inputs_for_generation(
    self,
    input_ids: Tensor,
    state: TransformerVQState | None = None,
    attention_mask: Tensor | None = None,
    is_first_iteration: bool = False,
    **kwargs: Any,
  ) -> dict[str, Any]:
    """What `generate` gives to `forward`: all tokens at first, then the last one."""
    if state is not None and not is_first_iteration:
      input_ids = input_ids[:, -1:]
    return {
      'input_ids': input_ids,
      'state': state,
      'attention_mask': attention_mask,
      'logits_to_keep': 1,
      'use_cache': kwargs.get('use_cache', True),
    }

  def _update_model_kwargs_for_generation(
    self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
  ) -> dict[str, Any]:
    if outputs.get('state') is not None:
      model_kwargs['state'] = outputs['state']
    return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

  @classmethod
  def _supports_default_dynamic_cache(cls) -> bool:
    return False

  @staticmethod
  def _reorder_cache(state: TransformerVQState, beam_idx: Tensor) -> TransformerVQState:
    return state.select(beam_idx.to(state.position.device))


def _padding(attention_mask: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
  """Where the tokens of each row begin, and how many there are, [B] each."""
  batch_size, length = tokens.shape
  if attention_mask is None:
    none = torch.zeros([batch_size], dtype=torch.long, device=tokens.device)
    return none, none + length
  mask = attention_mask[:, -length:].long()
  lengths = mask.sum(1)
  first = mask.argmax(1)
  places = torch.arange(length, device=tokens.device) - first[:, None]
  if not torch.equal(mask, ((places >= 0) & (places < lengths[:, None])).long()):
    raise ValueError('attention_mask: padding stands at the left or at the right of a row.')
  return first, lengths
