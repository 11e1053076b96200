"""Every array of the reference implementation's files, within 1e-5 absolute or 1e-4 relative."""

import re

import case as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import assert_close, assert_trees_close

from tvq_t5x.network import decoding, sampling, xla
from tvq_t5x.network.config import Reduction
from tvq_t5x.network.positions import relative_shift, sinusoids, window_mask
from tvq_t5x.network.vq.attention import log_counts
from tvq_t5x.network.vq.quantizer import MIN_COUNT
from tvq_t5x.training import train_step
from tvq_t5x.training.optimizers import codebook_labels, warmup_cosine


def needs(prefix):
  """Runs a test on the files that have a key with this prefix."""

  def mark(test):
    test.needs = prefix
    return test

  return mark


def segments(case):
  numbers = {int(match[1]) for key in case.arrays if (match := re.match(r'seg(\d+)/', key))}
  return [f'seg{i}/' for i in sorted(numbers)] or ['']


def run(case, overrides):
  """Runs the file's segments in order; yields prefix, outputs and gradients of each."""
  model = case.model(**overrides)
  params = case.to_params(case.tree('params/'), model.config)

  @jax.jit
  def step(params, batch, state):
    factor = batch['decoder_target_tokens'].size

    def loss_fn(params):
      loss, (new_state, metrics) = model.segment_loss(params, batch, state, None, factor)
      return loss, (new_state, metrics)

    with xla.training_gradients():
      (loss, (new_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    (logits, _, _), variables = model.module.apply(
      {'params': params}, batch['decoder_input_tokens'], state, mutable=['intermediates']
    )
    logprobs = jax.nn.log_softmax(logits)
    return new_state, (loss, metrics, grads, logprobs, variables['intermediates'])

  state = model.init_state(len(case[segments(case)[0] + 'inputs']))
  for prefix in segments(case):
    batch = golden.batch_of(case.tree(prefix))
    state, outputs = step(params, batch, state)
    yield prefix, model, params, state, *outputs


def sublayer(tree, config, i, j):
  """The leaves of attention sublayer j of layer i."""
  if config.scan_layers:
    return jax.tree.map(lambda x: x[i], tree['layers'][f'attention_{j}'])
  return tree[f'layers_{i}'][f'attention_{j}']


OVERRIDES = [
  {'reduction': reduction, 'scan_layers': scan, 'remat': remat, 'unroll_layers': remat == 'none'}
  for reduction, scan, remat in zip(
    [Reduction.UNROLLED, Reduction.SERIAL, Reduction.MATMUL, Reduction.ASSOCIATIVE],
    [True, True, False, True],
    ['attention', 'none', 'attention', 'layer'],
    strict=True,
  )
]


@needs('params/transformer')
@pytest.mark.parametrize(
  'overrides',
  [OVERRIDES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in OVERRIDES[1:])],
  ids=lambda x: str(x['reduction'].value),
)
def test_forward_losses_and_gradients(case, overrides):
  for prefix, model, params, state, loss, metrics, grads, logprobs, captured in run(
    case, overrides
  ):
    config = model.config
    assert_close(logprobs, case[prefix + 'logprobs'])
    assert_close(loss - case[prefix + 'l_codebook'], case[prefix + 'loss'])
    assert case[prefix + 'l_codebook'] == 0
    size = case[prefix + 'inputs'].size
    assert_close(metrics['cross_entropy'].total / size, case[prefix + 'loss_lm'])
    assert_close(metrics['commit_loss'].total / size, case[prefix + 'l_commit'])

    reference = case.tree(prefix + 'grads/')
    unused = 'token_embedder/bias_out'
    if not config.tied_embeddings:
      assert not reference[unused].any()
    expected = case.to_params(reference, config)
    labels = codebook_labels(grads)
    main, expected_main = (
      jax.tree.map(lambda x, label: x if label == 'main' else None, tree, labels)
      for tree in (grads, expected)
    )
    assert_trees_close(main, expected_main)
    check_codebooks(case, prefix, config, params, grads, labels)
    check_codes(case, prefix, config, captured)
    check_state(case, prefix, config, state)
    check_metrics(case, prefix, config, params, metrics, captured)


def check_codebooks(case, prefix, config, params, grads, labels):
  """Our statistics, through the moving average, give the reference's targets and gradients."""
  decay = config.ema_decay
  for i in range(config.num_layers):
    for j in range(golden.SUBLAYERS):
      ours = sublayer(params, config, i, j)['quantizer']
      statistics = sublayer(grads, config, i, j)['quantizer']
      name = f'transformer_layers_{i}/scanned_attn{j + 1}/quantizer'
      for leaf in ('c_sum', 'c_count'):
        new = decay * ours[leaf] + (1 - decay) * -statistics[leaf]
        assert_close(new, case[f'{prefix}codebook_new/{name}/{leaf}'])
        assert_close(ours[leaf] - new, case[f'{prefix}grads/{name}/{leaf}'])
  assert {'main', 'codebook'} == set(jax.tree.leaves(labels))


def check_codes(case, prefix, config, captured):
  for i in range(config.num_layers):
    for j in range(golden.SUBLAYERS):
      (codes,) = sublayer(captured, config, i, j)['codes']
      expected = case[f'{prefix}shortcodes/{i}/{j}']
      np.testing.assert_array_equal(np.moveaxis(codes, -1, 1), expected)


def check_state(case, prefix, config, state):
  for i in range(config.num_layers):
    for j in range(golden.SUBLAYERS):
      if config.scan_layers:
        ours = jax.tree.map(lambda x, i=i: x[i], state.layers[j])
      else:
        ours = state.layers[i][j]
      expected = case.tree(f'{prefix}attn_state/{i}/{j}/')
      assert_close(state.position, np.full(state.position.shape, expected['pos_offset']))
      np.testing.assert_array_equal(np.moveaxis(ours.codes, -1, 1), expected['xlcache/z'])
      assert_close(np.moveaxis(ours.keys, 2, 1), expected['xlcache/k_hat'])
      assert_close(np.moveaxis(ours.values, 2, 1), expected['xlcache/v'])
      assert_close(ours.cache.counts, expected['aggcache/lower'])
      assert_close(ours.cache.means, expected['aggcache/upper_div_lower'])
      # Document ids are carried by the reference and change no output: the last ones of its batch.
      doc_ids = case[prefix + 'doc_ids']
      held = expected['xlcache/doc_ids']
      np.testing.assert_array_equal(held[:, -doc_ids.shape[1] :], doc_ids[:, -held.shape[1] :])


def check_metrics(case, prefix, config, params, metrics, captured):
  """The reference's diagnostics, from our codebooks, keys and codes."""
  collected = {}
  for i in range(config.num_layers):
    for j in range(golden.SUBLAYERS):
      quantizer = sublayer(params, config, i, j)['quantizer']
      ((keys,), (codes,)) = (sublayer(captured, config, i, j)[x] for x in ('keys', 'codes'))
      for name, value in diagnostics(config, quantizer, keys, codes).items():
        collected.setdefault(name, []).append(value)
  size = case[prefix + 'inputs'].size
  ours = {name: np.mean(values) for name, values in collected.items()}
  ours['loss_commit_per_token'] = metrics['commit_loss'].total / size
  ours['loss_lm_per_token_unscaled'] = metrics['cross_entropy'].total / size
  ours['loss_mask_per_token'] = metrics['cross_entropy'].count / size
  expected = case.tree(prefix + 'metrics/')
  assert ours.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(ours[name], value, atol=1e-5, rtol=1e-4, err_msg=name)


def diagnostics(config, quantizer, keys, codes):
  """Averages over heads, batch and blocks of one sublayer."""
  floor = 1e-2
  count = np.maximum(quantizer['c_count'], MIN_COUNT)
  codebook = quantizer['c_sum'] / count[..., None]  # [N, S, K]
  norms = np.maximum(np.linalg.norm(codebook, axis=-1), floor)
  unit = codebook / norms[..., None]
  pairs = np.tril_indices(config.num_codes, -1)
  similarity = np.einsum('nsk,nzk->nsz', unit, unit)[:, *pairs]
  distance = np.linalg.norm(codebook[:, :, None] - codebook[:, None], axis=-1)[:, *pairs]
  shares = count / count.sum(-1, keepdims=True)
  nearest = np.asarray(codebook)[np.arange(len(codebook)), codes]
  key_norms = np.maximum(np.linalg.norm(keys, axis=-1), floor)  # [B, T, N]
  errors = np.clip(np.linalg.norm(keys - nearest, axis=-1) / key_norms, 0, 10)
  blocks = errors.reshape(errors.shape[0], -1, config.block_len, errors.shape[-1])
  return {
    **{
      f'c_{name}_{stat.__name__}': stat(value, axis=1).mean()
      for name, value in (
        ('sim', similarity),
        ('dist', distance),
        ('norm', norms),
        ('usage', count),
      )
      for stat in (np.min, np.mean, np.max)
    },
    'c_thresh_oob': ((count < 1) | (count > 1e6)).sum(axis=1).mean(),
    'c_entropy': -(shares * np.log(shares)).sum(axis=1).mean(),
    'vec_norm_mean': key_norms.mean(),
    'vec_hat_norm_mean': np.maximum(np.linalg.norm(nearest, axis=-1), floor).mean(),
    **{
      f'relative_err_{stat.__name__}': stat(blocks, axis=2).mean()
      for stat in (np.min, np.mean, np.max)
    },
  }


@pytest.mark.quick
@needs('logprobs')
def test_block_length_changes_nothing(case):
  """One token at a time, from the same parameters, gives the same log-probabilities and state."""
  model = case.model()
  params = case.to_params(case.tree('params/'), model.config)
  tokens = case['inputs']

  @jax.jit
  def decode(state, token):
    logits, state, _ = model.module.apply({'params': params}, token[:, None], state)
    return state, jax.nn.log_softmax(logits[:, 0])

  state, logprobs = jax.lax.scan(decode, model.init_state(len(tokens)), tokens.T)
  assert_close(jnp.swapaxes(logprobs, 0, 1), case['logprobs'])
  check_state(case, '', model.config, state)


@needs('logprobs')
@pytest.mark.parametrize('scan_layers', [pytest.param(True, marks=pytest.mark.slow), False])
def test_tokens_one_by_one_in_place(case, scan_layers):
  """As above, with the windows as rings."""
  model = case.model(scan_layers=scan_layers)
  config, tokens = model.config, case['inputs']
  params = case.to_params(case.tree('params/'), config)

  @jax.jit
  def decode(carry, token):
    state, i = carry
    logits, state, _ = model.module.apply({'params': params}, token[:, None], state, step=i)
    return (state, i + 1), jax.nn.log_softmax(logits[:, 0])

  state = model.init_state(len(tokens))
  carry = decoding.for_tokens(config, state), jnp.int32(0)
  (state, steps), logprobs = jax.lax.scan(decode, carry, tokens.T)
  assert_close(jnp.swapaxes(logprobs, 0, 1), case['logprobs'])

  check_state(case, '', config, decoding.from_tokens(config, state, steps))


@needs('steps/')
@pytest.mark.parametrize('in_parts', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_trace(case, in_parts):
  r = case.reference
  batch_size = r['global_batch_size']
  divisors = [n for n in range(2, batch_size + 1) if batch_size % n == 0]
  num_microbatches = divisors[0] if in_parts and divisors else 1
  model = case.model()
  batch_ids = sorted({int(key.split('/')[1]) for key in case.arrays if key.startswith('batches/')})
  params = case.to_params(case.tree('params_init/'), model.config)
  state = train_step.TrainState(jnp.zeros([], jnp.int32), params, model.optimizer.init(params))
  train = jax.jit(
    lambda state, batch: train_step.train_on_sequences(
      model, state, batch, jax.random.key(0), r['update_len'], num_microbatches
    )
  )
  step = 0
  for n in batch_ids:
    arrays = case.tree(f'batches/{n}/')
    state, metrics = train(state, golden.batch_of(arrays))
    for i in range(r['sequence_len'] // r['update_len']):
      expected = case.tree(f'steps/{step}/')
      size = r['global_batch_size'] * r['update_len']
      assert_close(metrics['loss'].total[i] / size, expected['loss'])
      assert_close(metrics['cross_entropy'].total[i] / size, expected['loss_lm'])
      assert_close(metrics['commit_loss'].total[i] / size, expected['l_commit'])
      assert_close(metrics['gradient_norm'].total[i], expected['grad_norm_main'])
      step += 1
    after = case.tree(f'params_after/{step - 1}/')
    if after:
      assert_trees_close(state.params, case.to_params(after, model.config))
  assert int(state.step) == step
  assert_trees_close(state.params, case.to_params(case.tree('params_final/'), model.config))


@pytest.mark.quick
@needs('steps/')
def test_learning_rates(case):
  r = case.reference
  schedule = warmup_cosine(r['lr_max'], r['n_warmup_step'], r['n_max_step'])
  steps = sorted({int(key.split('/')[1]) for key in case.arrays if key.startswith('steps/')})
  assert_close([schedule(i) for i in steps], [case[f'steps/{i}/lr'] for i in steps])


@pytest.mark.quick
@needs('masked/')
def test_nucleus(case):
  for p in case.reference['p']:
    masked = sampling.nucleus_filter(jnp.asarray(case['logits']), p)
    assert_close(masked, case[f'masked/{p}'])


@pytest.mark.quick
@needs('rel_shift/')
def test_relative_shift(case):
  for i in range(len(case.reference['rel_shift_shapes'])):
    x, y = case[f'rel_shift/{i}/x'], case[f'rel_shift/{i}/y']
    rows, columns = y.shape[-2:]
    # Keys after the query hold garbage in the reference, which masks them later.
    past = np.tri(rows, columns, columns - rows, dtype=bool)
    ours = relative_shift(jnp.asarray(x), columns)
    assert_close(np.where(past, ours, 0), np.where(past, y, 0))


@pytest.mark.quick
@needs('mask/')
def test_window_mask(case):
  for block_len, window_len, empty, local in case.reference[
    'masks_blocklen_memlen_invalid_locality'
  ]:
    ours = window_mask(block_len, window_len, jnp.int32(empty), bool(local))
    expected = case[f'mask/{block_len}_{window_len}_{empty}_{local}']
    ours = [np.broadcast_to(x, (block_len, x.shape[-1])) for x in ours]
    np.testing.assert_array_equal(np.concatenate(ours, axis=-1), expected)


@pytest.mark.quick
@needs('agg_bias/')
def test_cache_biases(case):
  assert_close(log_counts(jnp.asarray(case['agg_bias/lower'])), case['agg_bias/bias'])


@pytest.mark.quick
@needs('sinusoid/')
def test_sinusoids(case):
  for key, expected in case.tree('sinusoid/').items():
    length, width, lam, flip, start = (int(''.join(filter(str.isdigit, x))) for x in key.split('_'))
    positions = start + np.arange(length)
    ours = sinusoids(jnp.asarray(positions[::-1] if flip else positions), width, float(lam))
    assert_close(ours, expected)
