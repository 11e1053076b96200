"""The stack: what each option changes, and what must change nothing."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from util import (
  HEADS,
  LIGHT,
  assert_close,
  cases,
  param_shapes,
  random_params,
  random_tokens,
  small_config,
)

from tvq_t5x.network import xla
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import DROPOUT, SEQUENCE_DROPOUT
from tvq_t5x.network.positions import sinusoids
from tvq_t5x.network.transformer import Transformer, init_decoder_state


def forward(config):
  """Jitted forward function of a configuration."""
  module = Transformer(config)

  @jax.jit
  def apply(params, tokens, state=None, **kwargs):
    return module.apply({'params': params}, tokens, state, **kwargs)

  return apply


def with_dropout(config):
  module = Transformer(config)

  @jax.jit
  def apply(params, tokens, update_key, sequence_key, example_ids):
    rngs = {DROPOUT: update_key, SEQUENCE_DROPOUT: sequence_key}
    return module.apply(
      {'params': params}, tokens, example_ids=example_ids, deterministic=False, rngs=rngs
    )[0]

  return apply


QUADRATIC = {'attention_type': 'quadratic', 'kv_cache_len': 12}


SEGMENTS = {
  **HEADS,
  'quadratic': {**HEADS['gated_multi'], **QUADRATIC},
  'quadratic_mqa': {**HEADS['mqa'], **QUADRATIC},
}


@pytest.mark.parametrize('fields', cases(SEGMENTS, slow={'gated_multi', 'mha', 'quadratic_mqa'}))
def test_segments_and_single_tokens_equal_the_whole(fields):
  config = small_config(absolute_positions=True, **fields)
  params, tokens = random_params(config), random_tokens(config, 2, 12)
  apply = forward(config)
  logits, state, _ = apply(params, tokens)
  assert np.all(state.position == 12)
  # Two blocks, less than a block, one token; then token by token; then from an empty state.
  for lengths in ([8, 3, 1], [1] * 12, [12]):
    part_state, parts, start = init_decoder_state(config, 2), [], 0
    for length in lengths:
      out, part_state, _ = apply(params, tokens[:, start : start + length], part_state)
      parts.append(out)
      start += length
    assert_close(jnp.concatenate(parts, axis=1), logits, atol=1e-4, rtol=1e-4)
    assert_close(part_state, state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kv_cache_len', [1, 2, 5])
def test_quadratic_attention_remembers_as_many_positions_as_asked(kv_cache_len):
  config = small_config(attention_type='quadratic', kv_cache_len=kv_cache_len, **LIGHT)
  params, tokens = random_params(config), random_tokens(config, 2, 9)
  apply = forward(config)
  _, state, _ = apply(params, tokens[:, :7])
  out, after, _ = apply(params, tokens[:, 7:], state)
  # As if there had been no others.
  _, recent, _ = apply(params, tokens[:, 7 - kv_cache_len : 7])
  expected, expected_after, _ = apply(params, tokens[:, 7:], recent)
  assert_close(out, expected, atol=1e-4, rtol=1e-4)
  assert_close(after.layers, expected_after.layers, atol=1e-4, rtol=1e-4)
  other = tokens.at[:, 6 - kv_cache_len].set(tokens[:, 6 - kv_cache_len] % 10 + 1)
  assert_close(apply(params, tokens[:, 7:], apply(params, other[:, :7])[1])[0], out)


@pytest.mark.quick
@pytest.mark.parametrize('attention_type', ['vq', 'quadratic'])
def test_causality(attention_type):
  config = small_config(attention_type=attention_type)
  params, tokens = random_params(config), random_tokens(config, 1, 12)
  apply = forward(config)
  logits = apply(params, tokens)[0]
  for t in (0, 3, 4, 8):  # Both ends of a block and of the window.
    changed = tokens.at[0, t].set(tokens[0, t] % 10 + 1)
    difference = np.abs(apply(params, changed)[0] - logits).max(axis=-1)[0]
    np.testing.assert_array_equal(difference[:t], 0)
    # Everything later, also what is reached through the compressed cache only.
    assert np.all(difference[t:] > 1e-6)


def test_without_cache_a_layer_sees_no_further_than_the_window():
  config = small_config(compressed_cache=False, **LIGHT)
  params, tokens = random_params(config), random_tokens(config, 1, 12)
  apply = forward(config)
  difference = apply(params, tokens)[0] - apply(params, tokens.at[0, 2].set(10 - tokens[0, 2]))[0]
  changed = np.abs(difference).max(axis=-1)[0] > 1e-6
  expected = np.zeros(12, bool)
  expected[2 : 2 + config.window_len + 1] = True
  np.testing.assert_array_equal(changed, expected)


def unstacked(params):
  params = dict(params)
  stacked = params.pop('layers')
  layers = {f'layers_{i}': jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)}
  return {**params, **layers}


@pytest.mark.parametrize('remat', ['none', 'attention', 'layer'])
def test_the_backward_pass_does_not_look_for_codes_again(remat):
  config = small_config(**LIGHT, remat=remat)

  def loss(params, tokens):
    return jnp.sum(Transformer(config).apply({'params': params}, tokens)[0])

  program = jax.make_jaxpr(jax.grad(loss))(random_params(config), random_tokens(config, 2, 8))
  assert str(program).count(' argmax[') == 1


def test_scan_unroll_and_remat_change_nothing():
  config = small_config(head_type='mqa', num_heads=2)
  params, tokens = random_params(config), random_tokens(config, 2, 8)
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 11)), jnp.float32)

  def run(**overrides):
    module = Transformer(dataclasses.replace(config, **overrides))

    def loss(params):
      with xla.training_gradients():
        logits, state, aux = module.apply({'params': params}, tokens)
      (vq, mlp), total = aux, jnp.sum(weights * logits)
      assert not mlp
      total += jnp.sum(vq['commit_loss'].total) + jnp.sum(vq['codebook_statistics'].zero)
      return total, (logits, state, aux)

    scanned = module.config.scan_layers
    given = params if scanned else unstacked(params)
    (_, (logits, state, aux)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    if scanned:
      gradients = unstacked(gradients)
    else:
      state = state._replace(layers=jax.tree.map(lambda *x: jnp.stack(x), *state.layers))
    return logits, state, aux, gradients

  expected = run()
  for overrides in (
    {'remat': 'layer'},
    {'remat': 'none', 'scan_layers': False},
    {'remat': 'none', 'unroll_layers': True},
    {'remat': 'attention', 'unroll_layers': True},
  ):
    assert_close(run(**overrides), expected, atol=1e-4, rtol=1e-4)
  assert expected[2][0]['commit_loss'].total.shape == (2,)  # Layers.


def test_unrolled_layers_are_no_loop_in_training():
  config = small_config(**{**LIGHT, 'num_layers': 2, 'scan_layers': True}, reduction='unrolled')
  params, tokens = random_params(config), random_tokens(config, 1, 8)

  def loops(training, **overrides):
    module = Transformer(dataclasses.replace(config, **overrides))

    def loss(params):
      return jnp.sum(module.apply({'params': params}, tokens)[0])

    with xla.training_gradients() if training else contextlib.nullcontext():
      return jax.jit(jax.grad(loss)).lower(params).as_text().count('stablehlo.while')

  assert loops(True) == loops(False, unroll_layers=True) == 2  # Forward and backward.
  assert loops(True, unroll_layers=True) == 0


def test_loss_mask_changes_losses_only():
  config = small_config(**LIGHT)
  params, tokens = random_params(config), random_tokens(config, 2, 8)
  apply = forward(config)
  mask = jnp.ones([2, 8]).at[:, 5:].set(0)
  logits, state, aux = apply(params, tokens)
  masked_logits, masked_state, masked_aux = apply(params, tokens, loss_mask=mask)
  assert_close((masked_logits, masked_state), (logits, state), atol=0, rtol=0)
  # The rest of the losses is that of the rest of the positions.
  rest = apply(params, tokens, loss_mask=1 - mask)[2]
  masked, rest, whole = (x[0]['commit_loss'].total for x in (masked_aux, rest, aux))
  assert_close(masked + rest, whole)
  assert np.all(masked < whole)


def test_output_projection():
  config = small_config(num_codes=2, **LIGHT)
  params, tokens = random_params(config), random_tokens(config, 1, 4)
  untied = forward(config)(params, tokens)[0]

  # Tied: the transposed table in place of the projection.
  table = params['token_embedder']['embedding']
  tied_config = dataclasses.replace(config, tied_embeddings=True)
  assert 'dense' not in param_shapes(tied_config)['params']['logits']
  tied_params = {**params, 'logits': {'bias': params['logits']['bias']}}
  tied = forward(tied_config)(tied_params, tokens)[0]
  own = {'dense': {'kernel': table.T}, 'bias': params['logits']['bias']}
  assert_close(tied, forward(config)({**params, 'logits': own}, tokens)[0])
  assert np.abs(tied - untied).max() > 0.1

  scaled = forward(dataclasses.replace(config, logit_scale=0.005))(params, tokens)[0]
  assert_close(scaled, 0.005 * untied, atol=1e-7)

  # A final norm of gain 0 leaves its bias.
  normed = {**params, 'final_norm': {'scale': jnp.zeros(8), 'bias': jnp.arange(8.0)}}
  logits = forward(dataclasses.replace(config, final_norm=True))(normed, tokens)[0]
  row = jnp.arange(8.0) @ params['logits']['dense']['kernel'] + params['logits']['bias']
  assert_close(logits, jnp.broadcast_to(row, logits.shape), atol=1e-4)


def test_logits_are_float32_with_bfloat16_activations():
  config = small_config(**LIGHT)
  params, tokens = random_params(config), random_tokens(config, 1, 8)
  half = dataclasses.replace(config, dtype='bfloat16')
  logits, state, _ = forward(half)(params, tokens)
  assert logits.dtype == jnp.float32
  assert state.layers[0][0].keys.dtype == jnp.bfloat16
  # Codes may differ at near ties, so only most logits are close.
  expected = forward(config)(params, tokens)[0]
  assert np.median(np.abs(logits - expected)) < 0.05 * np.std(expected)


RATES = {'sinusoid_dropout_rate': 0.3, 'residual_dropout_rate': 0.3, 'layer_drop_rate': 0.3}


def test_deterministic_calls_ignore_rates_and_rngs():
  config = small_config(**LIGHT)
  params, tokens = random_params(config), random_tokens(config, 1, 4)
  module = Transformer(dataclasses.replace(config, **RATES))
  rngs = {DROPOUT: jax.random.key(0), SEQUENCE_DROPOUT: jax.random.key(1)}
  logits = jax.jit(module.apply)({'params': params}, tokens, rngs=rngs)[0]
  np.testing.assert_array_equal(logits, forward(config)(params, tokens)[0])


def test_masks_follow_examples_and_keys():
  config = small_config(head_type='mha', **RATES)
  params, tokens = random_params(config), random_tokens(config, 4, 8)
  apply = with_dropout(config)
  keys = [jax.random.key(i) for i in range(4)]
  ids = jnp.arange(4)
  logits = apply(params, tokens, keys[0], keys[1], ids)
  order = jnp.array([2, 0, 3, 1])
  permuted = apply(params, tokens[order], keys[0], keys[1], ids[order])
  assert_close(permuted, logits[order])
  # Other ids, other masks; and either key matters.
  for args in ([keys[0], keys[1], ids + 4], [keys[2], keys[1], ids], [keys[0], keys[2], ids]):
    assert np.all(np.abs(apply(params, tokens, *args) - logits).max(axis=(1, 2)) > 1e-3)
  # Copies of an example have masks of their own.
  copies = jnp.broadcast_to(tokens[:1], tokens.shape)
  logits = apply(params, copies, keys[0], keys[1], ids)
  assert np.all(np.abs(logits[1:] - logits[0]).max(axis=(1, 2)) > 1e-3)


def test_masks_of_the_sequence_are_the_same_in_every_update():
  rates = {'sinusoid_dropout_rate': 0.3, 'layer_drop_rate': 0.3}
  config = small_config(**rates, **LIGHT)
  params, tokens = random_params(config), random_tokens(config, 2, 4)
  apply = with_dropout(config)
  first, second = (
    apply(params, tokens, jax.random.key(i), jax.random.key(5), jnp.arange(2)) for i in range(2)
  )
  np.testing.assert_array_equal(first, second)


def test_layer_drop_leaves_the_residual_stream():
  """A sublayer is dropped for a whole example, at its rate."""
  config = small_config(layer_drop_rate=0.4, **LIGHT)
  params = random_params(config)
  tokens = jnp.full([500, 2], 3)
  logits = with_dropout(config)(
    params, tokens, jax.random.key(0), jax.random.key(1), jnp.arange(500)
  )
  x = params['token_embedder']['embedding'][3]
  untouched = x @ params['logits']['dense']['kernel'] + params['logits']['bias']
  # Both sublayers dropped: 0.4^2 of the examples.
  both = np.isclose(logits, untouched, atol=1e-4).all(axis=-1)
  np.testing.assert_array_equal(both[:, 0], both[:, 1])
  assert abs(both[:, 0].mean() - 0.16) < 4 * (0.16 * 0.84 / 500) ** 0.5


def test_sinusoid_dropout():
  """One mask for the whole batch, drawn before the projection of distances."""
  width = 8
  config = small_config(key_dim=width, window_len=511, sinusoid_dropout_rate=0.25, **LIGHT)
  params = random_params(config)
  attention = params['layers_0']['attention_0']
  attention['distance']['kernel'] = jnp.eye(width)[:, None, :]

  def is_distance(module: nn.Module, _: str) -> bool:
    return module.name == 'distance'

  _, captured = jax.jit(
    lambda: Transformer(config).apply(
      {'params': params},
      random_tokens(config, 2, 4),
      deterministic=False,
      rngs={SEQUENCE_DROPOUT: jax.random.key(0)},
      capture_intermediates=is_distance,
      mutable=['intermediates'],
    )
  )()
  (dropped,) = captured['intermediates']['layers_0']['attention_0']['distance']['__call__']
  dropped = np.asarray(dropped)[:, 0]
  full = np.asarray(sinusoids(jnp.arange(512), width, config.max_wavelength))
  known = full != 0
  zero = dropped[known] == 0
  assert_close(dropped[known][~zero], full[known][~zero] / 0.75)
  assert abs(zero.mean() - 0.25) < 4 * (0.25 * 0.75 / zero.size) ** 0.5


@pytest.mark.parametrize('heads', [HEADS['gated_multi'], HEADS['mqa']], ids=str)
def test_quadratic_baseline_has_the_same_parameters_but_codebooks(heads):
  def names_and_shapes(attention_type):
    params = param_shapes(small_config(attention_type=attention_type, **heads))['params']
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

  quantized, baseline = names_and_shapes('vq'), names_and_shapes('quadratic')
  codebooks = {name for name in quantized if name.endswith(("['c_sum']", "['c_count']"))}
  assert len(codebooks) == 2 * small_config(**heads).layer_sublayers.count('vq')
  assert baseline == {name: x for name, x in quantized.items() if name not in codebooks}


@pytest.mark.quick
def test_codebook_of_the_very_keys_gives_the_quadratic_baseline():
  config = small_config(num_heads=2, num_codes=12, **LIGHT)
  params, tokens = random_params(config), random_tokens(config, 1, 12)
  # All tokens differ, so all keys do: the one at t is code t.
  tokens = jnp.arange(12)[None] % 11
  baseline = forward(dataclasses.replace(config, attention_type='quadratic'))
  attention = params['layers_0']['attention_0']
  quantizer = attention.pop('quantizer')
  expected, _, aux = baseline(params, tokens)
  assert aux == ({}, {})

  attention['quantizer'] = quantizer
  apply = jax.jit(
    lambda params: Transformer(config).apply({'params': params}, tokens, mutable=['intermediates'])
  )
  _, captured = apply(params)
  (keys,) = captured['intermediates']['layers_0']['attention_0']['keys']  # [B, T, N, K]
  attention['quantizer'] = {
    'c_sum': jnp.swapaxes(keys[0], 0, 1),
    'c_count': jnp.ones_like(quantizer['c_count']),
  }
  (logits, _, aux), _ = apply(params)
  assert_close(logits, expected, atol=1e-4)
  assert np.all(aux[0]['commit_loss'].total < 1e-6)


def count_formula(c, quadratic=False):
  d, h, n, k, v = c.emb_dim, c.num_heads, c.num_kv_heads, c.key_dim, c.value_width
  gated = c.head_type == 'gated'
  # Query, key, distance, value, output; norm; biases u and w.
  attention = d * (h * k + 2 * n * k + n * v + h * v) + 2 * d + 2 * h * k
  attention += d * h * v if gated else 0
  attention += 0 if quadratic else n * c.num_codes * (k + 1)
  mlp = 2 * d * {'mha': 4 * d, 'mqa': 5 * d}.get(c.head_type, 0) + 2 * d
  layer = 2 * attention if gated else attention + mlp
  output = c.vocab_size * (1 + (0 if c.tied_embeddings else d))
  return (
    c.vocab_size * d
    + c.num_layers * layer
    + output
    + (2 * d if c.final_norm else 0)
    + (1 if c.absolute_positions else 0)
  )


def count(config):
  return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)['params']))


@pytest.mark.quick
@pytest.mark.parametrize('heads', HEADS.values(), ids=HEADS)
def test_number_of_parameters(heads):
  options = {'tied_embeddings': True, 'final_norm': True, 'absolute_positions': True}
  for overrides in ({}, options, {'scan_layers': False}):
    config = small_config(**heads, **overrides)
    assert count(config) == count_formula(config)
  baseline = small_config(attention_type='quadratic', **heads)
  assert count(baseline) == count_formula(baseline, quadratic=True)


@pytest.mark.parametrize(
  ('emb_dim', 'vocab_size', 'tied', 'millions'),
  [(768, 256, False, 190), (2048, 32_000, True, 1300), (2048, 256, True, 1200)],
)
def test_sizes_of_the_paper(emb_dim, vocab_size, tied, millions):
  config = TransformerConfig(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    key_dim=128,
    num_layers=24,
    num_codes=512,
    block_len=512,
    window_len=512,
    tied_embeddings=tied,
    final_norm=tied,
  )
  assert config.value_width == 2 * emb_dim
  # The paper rounds to two digits.
  assert abs(count(config) / 1e6 / millions - 1) < 0.05


@pytest.mark.quick
@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('heads', [HEADS['gated_single'], HEADS['mqa']], ids=str)
def test_every_parameter_has_named_axes(heads, scan_layers):
  config = small_config(scan_layers=scan_layers, final_norm=True, absolute_positions=True, **heads)
  variables = param_shapes(config)
  axes = nn_partitioning.get_axis_names(variables['params_axes'])
  ranks = jax.tree.map(lambda x: len(x.shape), variables['params'])
  is_spec = {'is_leaf': lambda x: isinstance(x, jax.sharding.PartitionSpec)}
  assert jax.tree.map(len, axes, **is_spec) == ranks
  names = {str(name) for spec in jax.tree.leaves(axes, **is_spec) for name in spec}
  assert names <= {'layers', 'embed', 'vocab', 'mlp', 'heads', 'single_head', 'kv', 'code'}
  if scan_layers:
    stacked = jax.tree.leaves(axes['layers'], **is_spec)
    assert all(spec[0] == 'layers' for spec in stacked)
