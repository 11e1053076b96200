"""Parameters and settings of the paper's own code as those of this package.

Three branches of github.com/transformer-vq/transformer_vq differ in names and in what they compute:

- `main` (and `legacy`): `transformer_layers_I/scanned_attnJ/...`; gated heads only.
- `optimized`: `stack/VQAttention_J/...`, stacked over layers and once more; also MHA and MQA.
- `tensor-parallel`: `stack/VQAttention_J/...`, stacked over layers; a single gated head.

The last two normalize without gain and bias and scale the features rather than the logits. They
also multiply what a batch adds to the sums and counts of a codebook by the number of blocks of a
sequence, the third by that of the devices too. Codes, which are sums over counts, are not changed
by it; but this package's averages, if training went on, would take so many times longer to follow.
So both are divided by the factor, and codes remain what they are.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tvq_t5x.common.errors import CheckpointError, ConfigError, is_count
from tvq_t5x.interop import arrays
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.vq.quantizer import MIN_COUNT

Arrays = Mapping[str, np.ndarray]

_GIN_FILES = {
  'enwik8': 'gin/enwik8_base.gin',
  'pg19': 'gin/pg19_large.gin',
  'imagenet64': 'gin/imagenet64_large.gin',
}
_STACK = re.compile(
  r'stack/(?:ScannedAttnOld|VQAttention|FullAttention|FullAttentionOld|MultiLayerPerceptron)_(\d)/'
  r'(?:Scan\w+/)?(.+)'
)


class Converted(NamedTuple):
  """A model of the author's in this package's terms.

  Attributes:
    settings: fields of TransformerConfig.
    params: by the names of `arrays`, float32.
    notes: what was changed, in words.
    given: the flag and its value, for messages.
  """

  settings: dict[str, Any]
  params: dict[str, np.ndarray]
  notes: list[str]
  given: str

  @property
  def bindings(self) -> list[str]:
    """The settings as a gin file of this package takes them."""
    return [
      f'VOCAB_SIZE = {value!r}'
      if name == 'vocab_size'
      else f'config.TransformerConfig.{name} = {value!r}'
      for name, value in self.settings.items()
    ]

  def params_like(self, like: Any, config: TransformerConfig) -> Any:
    """The parameters as nested dicts.

    Args:
      like: shapes of the parameters of the model.
      config: of the model, from `settings`.

    Raises:
      ConfigError: if a gin setting made it another model.
    """
    shapes = {name: x.shape for name, x in self.params.items()}
    if different := arrays.differences(shapes, arrays.shapes(like, config)):
      raise ConfigError(
        f'{self.given} is of another model than --gin_file and --gin.* say: {"; ".join(different)}.'
      )
    return arrays.to_params(like, config, self.params.__getitem__)


def convert(params: Arrays, settings: Mapping[str, Any], given: str) -> Converted:
  """Converts parameters.

  Args:
    params: by his names, with slashes.
    settings: what they were trained with, by his names.
    given: the flag and its value, for messages.

  Raises:
    ConfigError: if a setting is missing or wrong, or the model is one that is not converted.
    CheckpointError: if the parameters are none of the author's.
  """
  read = _Settings(settings)
  try:
    if any(name.startswith('transformer_layers_0/') for name in params):
      return _of_main(params, read, given)
    if any('/codebook_sum' in name for name in params):
      return _of_stack(params, read, given, 'tensor-parallel')
    if any(name.startswith('stack/') and name.endswith('/c_sum') for name in params):
      return _of_stack(params, read, given, 'optimized')
  except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
    if isinstance(e, ConfigError):
      raise
    raise CheckpointError(
      f'{given} can not be converted: its arrays are not those of the paper ({e!r}).'
    ) from e
  if any('Attention' in name for name in params):
    raise ConfigError(f'{given} is the quadratic baseline, which is not converted.')
  raise CheckpointError(
    f'{given} can not be converted: its arrays have other names than those of the paper.'
  )


def gin_file(settings: Mapping[str, Any]) -> str:
  """The run of the paper on the data set of the settings.

  Raises:
    ConfigError: if there is none.
  """
  name = settings.get('dataset')
  if name not in _GIN_FILES:
    raise ConfigError(
      f'dataset = {name!r} in --author_settings: give one of {", ".join(_GIN_FILES)}, or the gin '
      'file of a run with --gin_file.'
    )
  return _GIN_FILES[name]


def run_bindings(settings: Mapping[str, Any]) -> list[str]:
  """Settings of that run: how long sequences and updates are."""
  length = settings.get('sequence_len')
  if not is_count(length):
    return []
  update_len = settings.get('update_len')
  lengths = {'targets': length}
  return [
    f'TASK_FEATURE_LENGTHS = {lengths!r}',
    f'UPDATE_LEN = {update_len if is_count(update_len) else length!r}',
  ]


class _Settings:
  """The author's settings, asked for by name; refuses what is missing or no number."""

  def __init__(self, settings: Mapping[str, Any]):
    self._settings = settings

  def number(self, name: str, default: float | None = None) -> float:
    value = self._settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise self._wrong(name, 'a number')
    return value

  def count(self, name: str) -> int:
    value = self._settings.get(name)
    if not is_count(value):
      raise self._wrong(name, 'a whole number of at least 1')
    return value

  def flag(self, name: str, default: bool | None = None) -> bool:
    value = self._settings.get(name, default)
    if value not in (0, 1):
      raise self._wrong(name, '0 or 1')
    return bool(value)

  def choice(self, name: str, default: str, accepted: tuple[str, ...]) -> str:
    value = self._settings.get(name, default)
    if value not in accepted:
      raise self._wrong(name, f'one of {", ".join(accepted)}')
    return value

  def _wrong(self, name: str, accepted: str) -> ConfigError:
    value = repr(self._settings[name]) if name in self._settings else 'missing'
    return ConfigError(f'--author_settings: {name} is {value}; give {accepted}.')


def _common(settings: _Settings) -> dict[str, Any]:
  return {
    'block_len': settings.count('block_len'),
    'max_wavelength': float(settings.number('pe_lam', 1e5)),
    'sinusoid_dropout_rate': settings.number('p_dropsin', 0.0),
    'residual_dropout_rate': settings.number('p_dropres', 0.0),
    'layer_drop_rate': settings.number('p_droplyr', 0.0),
    'logit_scale': settings.number('e_scale'),
    'commit_weight': settings.number('c_beta', 1e-4),
    'ema_decay': settings.number('c_gamma', 0.99),
    'dtype': settings.choice('dtype', 'float32', ('float32', 'bfloat16')),
    'attention_type': 'vq',
    'sublayers': None,
    'mlp_dim': None,
  }


def _of_main(params: Arrays, settings: _Settings, given: str) -> Converted:
  prefix = 'transformer_layers_'
  num_layers = 1 + max(int(re.split('[_/]', n)[2]) for n in params if n.startswith(prefix))
  first = f'{prefix}0/scanned_attn1'
  h, s, k = params[f'{first}/quantizer/c_sum'].shape
  w, d = params['token_embedder/embs'].shape
  v = params[f'{first}/res_proj/kernel'].shape[0] // h
  found = {'token_embedder.embedding': params['token_embedder/embs']}
  for i in range(num_layers):
    for j in (0, 1):
      his, ours = f'{prefix}{i}/scanned_attn{j + 1}/', f'layers.{i}.attention_{j}.'
      x = {n.removeprefix(his): a for n, a in params.items() if n.startswith(his)}
      key, value, gate = np.split(x['kvg_proj/kernel'], [h * k, h * (k + v)], axis=1)
      part = {
        'norm.scale': x['input_ln/g'],
        'norm.bias': x['input_ln/b'],
        'query.kernel': x['q_proj/kernel'].reshape(d, h, k),
        'key.kernel': key.reshape(d, h, k),
        'value.kernel': value.reshape(d, h, v),
        'gate.kernel': gate.reshape(d, h, v),
        'distance.kernel': x['r_proj/kernel'].reshape(d, h, k),
        'content_bias': x['u'].reshape(h, k),
        'position_bias': x['v'].reshape(h, k),
        'out.kernel': x['res_proj/kernel'].reshape(h, v, d),
        'quantizer.c_sum': x['quantizer/c_sum'],
        'quantizer.c_count': x['quantizer/c_count'],
      }
      found |= {ours + name: a for name, a in part.items()}
  tied, final_norm = 'out_proj/kernel' not in params, 'out_ln/g' in params
  if tied:
    found['logits.bias'] = params['token_embedder/bias_out']
  else:
    found['logits.dense.kernel'] = params['out_proj/kernel']
    found['logits.bias'] = params['out_proj/bias']
  if final_norm:
    found |= {'final_norm.scale': params['out_ln/g'], 'final_norm.bias': params['out_ln/b']}
  positions = params.get('position_embedder/scale')
  if positions is not None:
    found['position_scale'] = positions
  ours = {
    **_sizes(w, d, h, k, v, s, num_layers),
    **_common(settings),
    'head_type': 'gated',
    'window_len': settings.count('mem_len'),
    'compressed_cache': settings.flag('agg_cache', True),
    'grad_through_cache': settings.flag('grad_thru_cache', True),
    'absolute_positions': positions is not None,
    'tied_embeddings': tied,
    'final_norm': final_norm,
  }
  return Converted(ours, found, ['The branch is main: arrays are as they were.'], given)


def _sizes(w: int, d: int, h: int, k: int, v: int, s: int, num_layers: int) -> dict[str, Any]:
  return {
    'vocab_size': w,
    'emb_dim': d,
    'num_heads': h,
    'key_dim': k,
    'value_dim': v,
    'num_codes': s,
    'num_layers': num_layers,
  }


def _of_stack(params: Arrays, settings: _Settings, given: str, branch: str) -> Converted:
  sublayers = _sublayers(params, branch == 'optimized')
  num_layers = len(next(iter(sublayers[0].values())))
  w, d = params['token_embed/embedding'].shape
  first = {name: x[0] for name, x in sublayers[0].items()}
  n, s, k = first['quantizer/c_sum'].shape
  h = first['qkvg_producer/q_proj/kernel'].shape[1] // k
  v = first['qkvg_producer/v_proj/kernel'].shape[1] // n
  gated = 'qkvg_producer/g_proj/kernel' in first
  is_old = any('ScannedAttnOld' in name for name in params)
  factor = 1
  if not is_old:
    factor = settings.count('sequence_len') // settings.count('block_len')
    factor *= settings.count('n_device') if branch == 'tensor-parallel' else 1
  found = {'token_embedder.embedding': params['token_embed/embedding']}
  number_of = {'attention': 0, 'mlp': 0}
  for arrays_of_layers in sublayers:
    is_mlp = 'Dense_0/kernel' in arrays_of_layers
    name = 'mlp' if is_mlp else f'attention_{number_of["attention"]}'
    number_of['mlp' if is_mlp else 'attention'] += 1
    for i in range(num_layers):
      x = {his: a[i] for his, a in arrays_of_layers.items()}
      part = _mlp(x, d) if is_mlp else _attention(x, (d, h, n, k, v), factor)
      found |= {f'layers.{i}.{name}.{ours}': a for ours, a in part.items()}
  scale, tied = settings.number('e_scale'), 'out_proj/kernel' not in params
  found['logits.bias'] = np.zeros([w], np.float32)
  if not tied:
    found['logits.dense.kernel'] = params['out_proj/kernel']
    # Of his scaled features; ours is scaled with the logits.
    found['logits.bias'] = params.get('out_proj/bias', found['logits.bias']) / np.float32(scale)
  final_norm, positions = settings.flag('e_preln'), params.get('pos_embed/scale')
  if final_norm:
    found |= {'final_norm.scale': np.ones([d], np.float32), 'final_norm.bias': np.zeros([d])}
  if positions is not None:
    found['position_scale'] = positions
  ours = {
    **_sizes(w, d, h, k, v, s, num_layers),
    **_common(settings),
    'head_type': 'gated' if gated else 'mha' if n == h else 'mqa',
    'window_len': settings.count('block_len'),
    'compressed_cache': True,
    'grad_through_cache': True,
    'absolute_positions': positions is not None,
    'tied_embeddings': tied,
    'final_norm': final_norm,
  }
  return Converted(ours, found, [_note(branch, factor)], given)


def _note(branch: str, factor: int) -> str:
  if factor == 1:
    return f'The branch is {branch}: sums and counts of the codebooks are as they were.'
  return (
    f'The branch is {branch}: it counts each key {factor} times, so that sums and counts of the '
    f'codebooks are divided by {factor}; the codes remain what they are.'
  )


def _sublayers(params: Arrays, squeeze: bool) -> list[dict[str, np.ndarray]]:
  """The arrays of each sublayer [layers, ...] by his names, attention first."""
  found: dict[tuple[bool, int], dict[str, np.ndarray]] = {}
  for name, x in params.items():
    if match := _STACK.fullmatch(name):
      is_mlp = 'MultiLayerPerceptron' in name
      rest = match[2].replace('codebook_', 'c_')
      if squeeze:
        x = np.squeeze(x, axis=1)
      elif rest.startswith('quantizer/'):
        x = x[:, None]  # A head.
      found.setdefault((is_mlp, int(match[1])), {})[rest] = x
  return [found[key] for key in sorted(found)]


def _attention(
  x: Arrays, sizes: tuple[int, int, int, int, int], factor: int
) -> dict[str, np.ndarray]:
  d, h, n, k, v = sizes
  c_sum, c_count = _undo(x['quantizer/c_sum'], x['quantizer/c_count'], factor)
  gate = x.get('qkvg_producer/g_proj/kernel')
  return {
    **_norm(d),
    'query.kernel': x['qkvg_producer/q_proj/kernel'].reshape(d, h, k),
    'key.kernel': x['qkvg_producer/k_proj/kernel'].reshape(d, n, k),
    'value.kernel': x['qkvg_producer/v_proj/kernel'].reshape(d, n, v),
    **({} if gate is None else {'gate.kernel': gate.reshape(d, h, v)}),
    'distance.kernel': x['xl_bias_producer/xl_r_proj/kernel'].reshape(d, n, k),
    'content_bias': x['xl_bias_producer/xl_u'].reshape(h, k),
    'position_bias': x['xl_bias_producer/xl_v'].reshape(h, k),
    'out.kernel': x['res_proj/kernel'].reshape(h, v, d),
    'quantizer.c_sum': c_sum,
    'quantizer.c_count': c_count,
  }


def _mlp(x: Arrays, d: int) -> dict[str, np.ndarray]:
  return {**_norm(d), 'wi.kernel': x['Dense_0/kernel'], 'wo.kernel': x['Dense_1/kernel']}


def _norm(d: int) -> dict[str, np.ndarray]:
  return {'norm.scale': np.ones([d], np.float32), 'norm.bias': np.zeros([d], np.float32)}


def _undo(c_sum: np.ndarray, c_count: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
  """Sums [N, S, K] and counts [N, S] of keys counted once, with the same codes."""

  def at_least(count: np.ndarray) -> np.ndarray:
    return np.maximum(count, np.float32(MIN_COUNT))[..., None]

  once = c_count / np.float32(factor)
  # A code that is hardly used has a sum over the least count in both.
  return c_sum * (at_least(once) / at_least(c_count)), once
