"""What a checkpoint says of its model, and which of it another model has to share."""

import functools

import pytest
from util import small_config

from tvq_t5x.checkpoints.model_settings import differences, settings_of
from tvq_t5x.network.longvq.longvq import LongVQ

pytestmark = pytest.mark.quick


def longvq(**fields):
  return settings_of(small_config(sublayers=(functools.partial(LongVQ, **fields), 'mlp')))


def test_what_changes_the_speed_of_a_mixer_only_is_no_difference():
  assert differences(longvq(chunk_len=8), longvq()) == ([], [])
  (refused,), accepted = differences(longvq(state_size=8), longvq(chunk_len=8))
  assert 'TransformerConfig.sublayers' in refused and "'state_size': 8" in refused
  assert not accepted


def test_how_codes_live_is_a_matter_of_training():
  """A run may go on with other settings, and is told of them."""
  changed = {'codes_from_keys': True, 'replace_below': 0.1}
  refused, told = differences(settings_of(small_config()), settings_of(small_config(**changed)))
  assert not refused
  assert told == [
    f'TransformerConfig.{name} = {value}, there {before}'
    for (name, value), before in zip(changed.items(), (False, 0.0), strict=True)
  ]
