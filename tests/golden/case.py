"""Reads a golden file: its configuration and its parameters in this package's layout."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio

from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import models, optimizers

SUBLAYERS = 2


class GoldenCase:
  """One .npz file; keys are slash paths."""

  def __init__(self, path: pathlib.Path):
    self.arrays = dict(np.load(path))
    self.reference = json.loads(str(self.arrays.pop('config')))

  def __getitem__(self, key: str) -> np.ndarray:
    return self.arrays[key]

  def has(self, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in self.arrays)

  def tree(self, prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

  def config(self, **overrides) -> TransformerConfig:
    r = self.reference
    fields = {
      'vocab_size': r['n_vocab'],
      'emb_dim': r['d_model'],
      'num_heads': r['n_head'],
      'key_dim': r['d_k'],
      'value_dim': r['d_v'],
      'num_layers': r['n_layer'],
      'num_codes': r['n_code'],
      'block_len': r['block_len'],
      'window_len': r['mem_len'],
      'compressed_cache': bool(r['agg_cache']),
      'grad_through_cache': bool(r['grad_thru_cache']),
      'absolute_positions': bool(r['pe_abs']),
      'max_wavelength': float(r['pe_lam']),
      'tied_embeddings': bool(r['e_tie']),
      'final_norm': bool(r['e_preln']),
      'logit_scale': float(r['e_scale']),
      'commit_weight': r['c_beta'],
      'ema_decay': r['c_gamma'],
    }
    return TransformerConfig(**{**fields, **overrides})

  def model(self, **overrides) -> models.TransformerVQModel:
    r = self.reference
    optimizer = optax.identity()
    if 'optimizer' in r:
      assert (r['optimizer'], r['lr_schedule']) == ('adamw', 'cosine')
      schedule = optimizers.warmup_cosine(r['lr_max'], r['n_warmup_step'], r['n_max_step'])
      optimizer = optimizers.adamw(schedule, weight_decay=r['wd_lam'], clip_norm=r['grad_clip'])
    module = Transformer(self.config(**overrides))
    return models.TransformerVQModel(module, seqio.PassThroughVocabulary(r['n_vocab']), optimizer)

  def to_params(self, flat: dict[str, np.ndarray], config: TransformerConfig) -> dict:
    """The reference's parameters, or gradients, in our layout (and shapes)."""
    d, k, v, h = config.emb_dim, config.key_dim, config.value_width, config.num_heads

    def attention(prefix):
      def get(name):
        return flat[f'{prefix}/{name}']

      kvg = get('kvg_proj/kernel')
      key, value, gate = np.split(kvg, [h * k, h * (k + v)], axis=1)
      return {
        'norm': {'scale': get('input_ln/g'), 'bias': get('input_ln/b')},
        'query': {'kernel': get('q_proj/kernel').reshape(d, h, k)},
        'key': {'kernel': key.reshape(d, h, k)},
        'value': {'kernel': value.reshape(d, h, v)},
        'gate': {'kernel': gate.reshape(d, h, v)},
        'distance': {'kernel': get('r_proj/kernel').reshape(d, h, k)},
        'content_bias': get('u').reshape(h, k),
        'position_bias': get('v').reshape(h, k),
        'out': {'kernel': get('res_proj/kernel').reshape(h, v, d)},
        'quantizer': {
          'c_sum': get('quantizer/c_sum'),
          'c_count': get('quantizer/c_count'),
        },
      }

    layers = [
      {
        f'attention_{j}': attention(f'transformer_layers_{i}/scanned_attn{j + 1}')
        for j in range(SUBLAYERS)
      }
      for i in range(config.num_layers)
    ]
    params = {'token_embedder': {'embedding': flat['token_embedder/embs']}}
    if config.scan_layers:
      params['layers'] = jax.tree.map(lambda *x: np.stack(x), *layers)
    else:
      params.update({f'layers_{i}': layer for i, layer in enumerate(layers)})
    if config.tied_embeddings:
      params['logits'] = {'bias': flat['token_embedder/bias_out']}
    else:
      params['logits'] = {
        'dense': {'kernel': flat['out_proj/kernel']},
        'bias': flat['out_proj/bias'],
      }
    if config.final_norm:
      params['final_norm'] = {'scale': flat['out_ln/g'], 'bias': flat['out_ln/b']}
    if config.absolute_positions:
      params['position_scale'] = flat['position_embedder/scale']
    return jax.tree.map(jnp.asarray, params)


def batch_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {
    'decoder_input_tokens': arrays['inputs'],
    'decoder_target_tokens': arrays['targets'],
    'decoder_loss_weights': arrays['loss_mask'].astype(np.float32),
  }


def assert_close(ours, reference):
  """Within 1e-5 absolute or 1e-4 relative."""
  np.testing.assert_allclose(np.asarray(ours), reference, atol=1e-5, rtol=1e-4)


def assert_trees_close(ours, reference):
  assert jax.tree.structure(ours) == jax.tree.structure(reference)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True
  ):
    np.testing.assert_allclose(
      np.asarray(a), b, atol=1e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path)
    )
