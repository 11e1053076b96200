"""Optimizers with the paper's settings, built from optax, and the codebooks' moving averages.

Each factory returns an `optax.GradientTransformation` for the ordinary parameters;
`with_codebook_ema` adds the branch for the codebooks, out of reach of clipping and decay.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvq_t5x.common.errors import ConfigError

# Gains and biases, which the paper's code leaves out of the weight decay as 1-D arrays. Names, not
# ranks, since scanned layers and heads add axes.
_NOT_DECAYED = frozenset(
  {
    *('scale', 'bias', 'content_bias', 'position_bias', 'window_bias'),
    *('query_scale', 'query_shift', 'key_scale', 'key_shift'),
  }
)
# Of a state-space layer, which its authors neither decay nor teach as fast as the rest.
_DYNAMICS = frozenset({'log_dt', 'log_decay', 'frequency', 'b_re', 'b_im'})
_DYNAMICS_RATE = 1e-3
_CODEBOOK = frozenset({'c_sum', 'c_count'})
# Parameters below this key are stacked on a leading layers axis.
_STACKED = 'layers'


def warmup_cosine(
  peak: float, warmup_steps: int, total_steps: int, final_share: float = 0.1
) -> optax.Schedule:
  """Learning rate: linear from 0 to `peak`, then cosine to `final_share * peak`.

  Args:
    peak: the highest learning rate.
    warmup_steps: parameter updates until then.
    total_steps: parameter updates until the end of the cosine, warm-up included.
    final_share: share of the peak that remains.

  Returns:
    Learning rate as a function of the update's index.

  Raises:
    ConfigError: for a negative peak, or if the warm-up does not end before the cosine does.
  """
  _check_rate('warmup_cosine.peak', peak)
  _check_warmup('warmup_cosine', warmup_steps, total_steps)
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup_steps else peak, peak, warmup_steps, total_steps, final_share * peak
  )


def warmup_linear(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
  """Learning rate: linear from 0 to `peak`, then linear to 0.

  Args:
    peak: the highest learning rate.
    warmup_steps: parameter updates until then.
    total_steps: parameter updates until 0 again, warm-up included.

  Returns:
    Learning rate as a function of the update's index.

  Raises:
    ConfigError: for a negative peak, or if the warm-up does not end before that.
  """
  _check_rate('warmup_linear.peak', peak)
  _check_warmup('warmup_linear', warmup_steps, total_steps)
  rise = optax.linear_schedule(0.0, peak, warmup_steps)
  fall = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
  return optax.join_schedules([rise, fall], [warmup_steps])


def _check_rate(setting: str, rate: optax.ScalarOrSchedule) -> None:
  if not callable(rate) and not 0 <= rate < math.inf:
    raise ConfigError(setting, rate, 'a finite number of at least 0')


def _check_warmup(schedule: str, warmup_steps: int, total_steps: int) -> None:
  if not 0 <= warmup_steps < total_steps:
    raise ConfigError(
      f'{schedule}.warmup_steps',
      warmup_steps,
      f'an integer from 0 to {schedule}.total_steps - 1 = {total_steps - 1}',
    )


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.98,
  eps: float = 1e-9,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  decay_follows_rate: bool = False,
) -> optax.GradientTransformation:
  """Adam with clipping by global norm and decoupled weight decay.

  Args:
    learning_rate: constant or schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: share of each decayed parameter that an update removes, whatever the learning
      rate.
    clip_norm: largest global norm of the gradients; None means no clipping.
    decay_follows_rate: whether that share is `weight_decay` times the learning rate instead, as in
      optax's and PyTorch's AdamW.

  Returns:
    The transformation.
  """
  scale = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)
  if decay_follows_rate:
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    scale, weight_decay = optax.chain(scale, decay), 0.0
  return _chain('adamw', clip_norm, scale, learning_rate, weight_decay)


def lion(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.95,
  b2: float = 0.98,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Lion, with the same clipping and decay as `adamw`."""
  scale = optax.scale_by_lion(b1, b2)
  return _chain('lion', clip_norm, scale, learning_rate, weight_decay)


def adafactor(
  learning_rate: optax.ScalarOrSchedule,
  update_clip: float = 1.0,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Adafactor whose learning rate is relative to each parameter's root mean square.

  Scanned layers are treated one by one, so that stacking them changes no update.

  Args:
    learning_rate: constant or schedule, times the parameter's root mean square.
    update_clip: largest root mean square of a parameter's update before the learning rate.
    weight_decay: as in `adamw`.
    clip_norm: as in `adamw`.

  Returns:
    The transformation.
  """
  scale = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(update_clip),
    optax.scale_by_param_block_rms(),
  )
  scale = optax.partition({'flat': scale, 'stacked': _for_each_layer(scale)}, _stacked_labels)
  return _chain('adafactor', clip_norm, scale, learning_rate, weight_decay)


def codebook_ema(decay: float) -> optax.GradientTransformation:
  """Moving averages of statistics that arrive as `gradient = -statistics`.

  The update is `p <- decay p + (1 - decay) statistics` (paper, section 3.1.2).
  """

  def update(updates, state, params=None):
    return jax.tree.map(lambda g, p: (1.0 - decay) * (-g - p), updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def with_codebook_ema(
  optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """Applies `optimizer` to all parameters but the codebooks, and `codebook_ema` to those."""
  return optax.partition({'main': optimizer, 'codebook': codebook_ema(decay)}, codebook_labels)


def codebook_labels(params: Any) -> Any:
  """Labels each parameter 'codebook' or 'main'."""
  return _map_names(lambda names: 'codebook' if names[-1] in _CODEBOOK else 'main', params)


def _chain(name, clip_norm, scale, learning_rate, weight_decay) -> optax.GradientTransformation:
  _check_rate(f'{name}.learning_rate', learning_rate)
  parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  parts += [scale, _scale_by_learning_rate(learning_rate)]
  if weight_decay:
    parts.append(optax.add_decayed_weights(-weight_decay, mask=_decayed))
  return optax.chain(*parts)


def _scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Optax's of this name, but the dynamics of state-space layers learn at 1e-3 at most (S4D)."""
  inner = optax.scale_by_learning_rate(learning_rate)

  def update(updates, state, params=None):
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    updates, state = inner.update(updates, state, params)
    is_dynamics = _map_names(lambda names: names[-1] in _DYNAMICS, updates)
    share = _DYNAMICS_RATE / jnp.maximum(rate, _DYNAMICS_RATE)
    return jax.tree.map(lambda u, slow: u * share if slow else u, updates, is_dynamics), state

  return optax.GradientTransformation(inner.init, update)


def _decayed(params: Any) -> Any:
  return _map_names(lambda names: names[-1] not in _NOT_DECAYED | _DYNAMICS, params)


def _stacked_labels(params: Any) -> Any:
  return _map_names(lambda names: 'stacked' if _STACKED in names else 'flat', params)


def _map_names(fn, params: Any) -> Any:
  """Maps `fn` over the key names on the path to each parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: fn([str(getattr(k, 'key', k)) for k in path]), params
  )


def _for_each_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` applied separately along the leading axis of every parameter."""

  def init(params):
    return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

  def update(updates, state, params=None):
    if not jax.tree.leaves(updates):
      return inner.update(updates, state, params)
    return jax.vmap(inner.update)(updates, state, params)

  return optax.GradientTransformation(init, update)
