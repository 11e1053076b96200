import dataclasses
import importlib.util
import pathlib

import jax.numpy as jnp
import pytest
from util import small_config

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.config import AttentionType, HeadType, Reduction, Remat, TransformerConfig

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
  ('field', 'value', 'accepted'),
  [
    ('head_type', 'multi', ['gated', 'mha', 'mqa']),
    ('attention_type', 'full', ['vq', 'quadratic']),
    ('reduction', 'parallel', ['auto', 'serial', 'unrolled', 'matmul', 'associative']),
    ('remat', True, ['none', 'attention', 'layer']),
    ('dtype', 'float16', ['float32', 'bfloat16']),
    ('dtype', 'floaty', ['float32', 'bfloat16']),
    ('dtype', jnp.int32, ['float32', 'bfloat16']),
    *(
      (field, value, ['positive integer'])
      for field, value in [
        ('vocab_size', 0),
        ('emb_dim', -2),
        ('num_heads', 1.0),
        ('key_dim', '4'),
        ('value_dim', 0),
        ('num_layers', 0),
        ('num_codes', None),
        ('block_len', True),
        ('window_len', 0),
      ]
    ),
    *(
      (field, 10**12, ['at most']) for field in ('emb_dim', 'num_heads', 'num_layers', 'num_codes')
    ),
    *(
      (field, 10**12, ['at most']) for field in ('block_len', 'window_len', 'vocab_size', 'mlp_dim')
    ),
    ('emb_dim', 7, ['even']),
    ('sinusoid_dropout_rate', 1.0, ['[0, 1)']),
    ('residual_dropout_rate', -0.1, ['[0, 1)']),
    ('layer_drop_rate', 30, ['[0, 1)']),
    ('ema_decay', 1.0, ['[0, 1)']),
    ('replace_below', 0.51, ['[0, 0.5]']),
    ('replace_below', -0.1, ['[0, 0.5]']),
  ],
)
def test_refusals_name_the_field_and_what_is_accepted(field, value, accepted):
  with pytest.raises(ConfigError) as error:
    small_config(**{field: value})
  message = str(error.value)
  assert f'TransformerConfig.{field} = ' in message
  assert all(word in message for word in accepted)


def test_strings_become_members_and_dtypes():
  config = small_config(
    head_type='mqa', attention_type='quadratic', reduction='serial', remat='layer', dtype='bfloat16'
  )
  assert config.head_type is HeadType.MQA
  assert config.attention_type is AttentionType.QUADRATIC
  assert config.reduction is Reduction.SERIAL
  assert config.remat is Remat.LAYER
  assert config.dtype == jnp.bfloat16
  # Equal configurations are one static argument of jit.
  assert hash(config) == hash(dataclasses.replace(config, head_type=HeadType.MQA))


@pytest.mark.parametrize(
  ('head_type', 'num_heads', 'kv_heads', 'group', 'sublayers', 'mlp_dim', 'value_dim'),
  [
    ('gated', 1, 1, 1, ('vq', 'vq'), 32, 16),
    ('gated', 4, 4, 1, ('vq', 'vq'), 32, 4),
    ('mha', 4, 4, 1, ('vq', 'mlp'), 32, 2),
    ('mqa', 4, 1, 4, ('vq', 'mlp'), 40, 2),
  ],
)
def test_head_types(head_type, num_heads, kv_heads, group, sublayers, mlp_dim, value_dim):
  config = TransformerConfig(
    vocab_size=3,
    emb_dim=8,
    key_dim=2,
    num_layers=1,
    num_codes=2,
    block_len=1,
    window_len=1,
    head_type=head_type,
    num_heads=num_heads,
  )
  assert config.num_kv_heads == kv_heads
  assert config.queries_per_kv_head == group
  assert config.layer_sublayers == sublayers
  assert config.value_width == value_dim
  if head_type != 'gated':
    assert config.mlp_width == mlp_dim


def test_axes_of_heads():
  assert TransformerConfig.heads_axis(1) != TransformerConfig.heads_axis(2) == 'heads'
  assert small_config().value_axis == 'mlp'
  assert small_config(num_heads=2).value_axis == 'kv'
  assert small_config(head_type='mqa').value_axis == 'kv'


@pytest.mark.parametrize(('length', 'blocks'), [(1, 1), (3, 1), (4, 1), (8, 2), (12, 3)])
def test_number_of_blocks(length, blocks):
  assert small_config(block_len=4).num_blocks(length) == blocks


@pytest.mark.parametrize('length', [5, 9])
def test_a_part_of_a_block_is_refused(length):
  with pytest.raises(ConfigError, match=rf'{length} tokens.*TransformerConfig.block_len = 4'):
    small_config(block_len=4).num_blocks(length)


def test_the_table_of_settings_is_that_of_the_class():
  path = pathlib.Path(__file__).parents[2] / 'docs' / 'settings_table.py'
  module = importlib.util.module_from_spec(importlib.util.spec_from_file_location('table', path))
  module.__spec__.loader.exec_module(module)
  text = module.PAGE.read_text(encoding='utf-8')
  assert module.page(text) == text, 'run python docs/settings_table.py'
  assert module.table().count('\n') == 2 + len(dataclasses.fields(TransformerConfig))
