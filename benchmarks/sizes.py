"""Flags for the size of the model, and for how often to time it, that the benchmarks share."""

import os
from typing import Any

import jax
from absl import flags

from tvq_t5x.network.config import TransformerConfig

ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed calls of each variant; medians are shown.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 1, 'Sequences.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of activations.')
_EMB_DIM = flags.DEFINE_integer('emb_dim', 256, 'Model width D; values are twice as wide.')
_NUM_LAYERS = flags.DEFINE_integer('num_layers', 2, 'Layers, of two attention sublayers each.')
_NUM_CODES = flags.DEFINE_integer('num_codes', 512, 'Codebook size S.')
_BLOCK_LEN = flags.DEFINE_integer('block_len', 512, 'Block length L and window length M.')
_MEMORY = flags.DEFINE_float('memory_gb', 0.0, 'Most to use; 0 means what is free.')

VOCAB_SIZE = 256


def config(**fields: Any) -> TransformerConfig:
  """The model that the flags describe, with `fields` besides."""
  return TransformerConfig(
    vocab_size=VOCAB_SIZE,
    emb_dim=_EMB_DIM.value,
    key_dim=128,
    num_layers=_NUM_LAYERS.value,
    num_codes=_NUM_CODES.value,
    block_len=_BLOCK_LEN.value,
    window_len=_BLOCK_LEN.value,
    dtype=_DTYPE.value,
    **fields,
  )


def free_bytes() -> float:
  """What a program may take of the first device."""
  if _MEMORY.value:
    return _MEMORY.value * 1e9
  stats = jax.devices()[0].memory_stats()
  if stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')


def described() -> str:
  """The model that the flags describe, in words."""
  return (
    f'batch {BATCH_SIZE.value}, {_DTYPE.value}, D = {_EMB_DIM.value}, {_NUM_LAYERS.value} layers, '
    f'S = {_NUM_CODES.value}, L = M = {_BLOCK_LEN.value}'
  )
