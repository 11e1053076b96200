"""A mixer of a user's own, defined here alone and named in gin, does all that the others do."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from jax.sharding import PartitionSpec
from mesh_util import SIZES, assert_same_numbers, by_name, on_host, shard_shapes
from util import assert_close, one_device, random_batch, random_params, random_tokens, small_config

from tvq_t5x import evaluate, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.generation import language_model
from tvq_t5x.network import decoding, sampling
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import Einsum, RMSNorm
from tvq_t5x.network.mixers import Loss, Mixer, Ratio
from tvq_t5x.network.transformer import Transformer, init_decoder_state
from tvq_t5x.training import compilation, placement
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner

TINY = pathlib.Path(__file__).parent / 'tiny.gin'
DECAY = 0.75
# Of the user, that the configuration of such a run names.
MODULES = ['test_own_mixer', 'tiny_task']
pytestmark = pytest.mark.usefixtures('cleared_gin')


class GatedAverage(Mixer):
  """A gated moving average of the positions so far."""

  decay: float = 0.9

  KIND = 'average'

  @nn.compact
  def __call__(self, x, state, call):
    d, axes = self.config.emb_dim, ('embed', 'mlp')
    y = RMSNorm(name='norm')(x)
    gate, value = (Einsum('BTD,DF->BTF', (d, d), axes, name=name)(y) for name in ('gate', 'value'))
    state = jnp.zeros([len(x), d]) if state is None else state

    def step(mean, inputs):
      i, value = inputs
      new = self.decay * mean + (1 - self.decay) * value
      kept = new if call.lengths is None else jnp.where((i < call.lengths)[:, None], new, mean)
      return kept, new

    state, means = jax.lax.scan(step, state, (jnp.arange(x.shape[1]), jnp.swapaxes(value, 0, 1)))
    y = nn.sigmoid(gate) * jnp.swapaxes(means, 0, 1)
    size = jnp.sum(call.loss_mask[..., None] * jnp.square(y))
    aux = {'average_loss': Loss(size, 1e-3), 'average_size': Ratio(size, jnp.sum(call.loss_mask))}
    return Einsum('BTF,FD->BTD', (d, d), axes[::-1], name='out')(y), state, aux

  def init_state(self, batch_size):
    return jnp.zeros([batch_size, self.config.emb_dim])

  def state_axes(self):
    return PartitionSpec('batch', 'mlp')


def gin_file(folder, *bindings):
  """A run of tiny.gin whose layers have the mixer."""
  path = folder / 'own.gin'
  path.write_text(
    f"""from __gin__ import dynamic_registration
import test_own_mixer
from tvq_t5x.network import config
include '{TINY}'
config.TransformerConfig.sublayers = [@test_own_mixer.GatedAverage, 'vq', 'mlp']
test_own_mixer.GatedAverage.decay = {DECAY}
"""
    + '\n'.join(bindings)
  )
  return str(path)


MACROS = {'TRAIN_STEPS': 8, 'CHECKPOINT_PERIOD': 4, 'EVAL_PERIOD': 8, 'CARRY_STATE': True}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """MODEL_DIR of a short run."""
  folder = tmp_path_factory.mktemp('own')
  settings = {**MACROS, 'SAMPLE_PERIOD': 8, 'MODEL_DIR': str(folder / 'run')}
  with one_device():
    assert train.run([gin_file(folder)], [f'{k} = {v!r}' for k, v in settings.items()]) == 0
  return folder / 'run'


def test_a_run_trains_evaluates_samples_and_carries_its_state(run, capsys):
  records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  last = {r['split']: r for r in records}
  assert set(last) == {'train', 'validation', 'test'}
  assert {'average_loss', 'average_size/layer_0', 'codebook_perplexity/layer_0'} <= last[
    'test'
  ].keys()
  assert (run / 'samples' / '00000008.txt').exists()
  metadata = layout.read_metadata(layout.folder(run, 8))
  own = {'test_own_mixer.GatedAverage': {'decay': DECAY}}
  assert metadata['model']['sublayers'] == [own, 'vq', 'mlp']
  assert 'carried/layers/0' in metadata['arrays']
  with one_device():
    code = evaluate.run([], checkpoint=str(run), split='test', json_file='-', modules=MODULES)
  assert code == 0
  found = json.loads(capsys.readouterr().out)
  np.testing.assert_allclose(found['cross_entropy'], last['test']['cross_entropy'], rtol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers(run, tmp_path):
  settings = {**MACROS, 'SAMPLE_PERIOD': 8, 'MODEL_DIR': str(tmp_path / 'run')}
  for steps in (4, 8):
    settings['TRAIN_STEPS'] = steps
    # The schedule is that of the whole run.
    bindings = [f'{k} = {v!r}' for k, v in settings.items()]
    bindings.append('optimizers.warmup_cosine.total_steps = 8')
    with one_device():
      assert train.run([gin_file(tmp_path)], bindings) == 0
  checkpoints = [layout.read_metadata(layout.folder(f, 8)) for f in (run, tmp_path / 'run')]
  assert checkpoints[0]['checksums'] == checkpoints[1]['checksums']


def test_text_is_scored_and_continued_token_by_token(run):
  with one_device():
    lm = language_model.load(str(run), modules=MODULES)
    state, _ = lm.read(lm.start(), ['the sea and the '])
    generated = lm.generate(state, 9, sampling=sampling.SamplingConfig(temperature=0))
    score = lm.score(generated.tokens[0], state)
  assert_close(score.nats, -generated.log_likelihoods[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope='module')
def network():
  config = small_config(sublayers=(GatedAverage, 'quadratic'), kv_cache_len=16, emb_dim=8)
  return Transformer(config), random_params(config)


def test_segments_and_prompts_of_any_length(network):
  module, params = network
  tokens = random_tokens(module.config, 3, 12)
  apply = jax.jit(module.apply)
  logits, whole, _ = apply({'params': params}, tokens)
  state, parts = init_decoder_state(module.config, 3), []
  for start, stop in ((0, 8), (8, 9), (9, 12)):
    out, state, _ = apply({'params': params}, tokens[:, start:stop], state)
    parts.append(out)
  assert_close(jnp.concatenate(parts, axis=1), logits, atol=1e-4, rtol=1e-4)
  assert_close(state, whole, atol=1e-4, rtol=1e-4)

  lengths = jnp.array([0, 5, 11])
  begun = decoding.start(module, 3)
  read, _, _ = jax.jit(lambda: decoding.read(module, params, begun, tokens, lengths))()
  for row, length in enumerate(lengths):
    one = decoding.start(module, 1)
    alone = decoding.read(module, params, one, tokens[row : row + 1, :length], lengths[row][None])
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(read), jax.tree.leaves(alone[0]), strict=True
    ):
      axis = 1 if 'layers' in jax.tree_util.keystr(path) else 0
      assert_close(jnp.take(x, row, axis), jnp.take(y, 0, axis), atol=1e-4, rtol=1e-4)


def trained(data, model_axis, num_microbatches):
  """Parameters and the carried state after two updates on a mesh, and the shards of the latter."""
  sizes = {'sublayers': (GatedAverage, 'quadratic', 'vq'), 'kv_cache_len': 8}
  config = TransformerConfig(**{**SIZES, **sizes}, num_layers=2)
  vocabulary = seqio.PassThroughVocabulary(32)
  model = TransformerVQModel(Transformer(config), vocabulary, optax.sgd(0.3), carry_state=True)
  partitioner = Partitioner(model_axis, devices=jax.devices('cpu')[: data * model_axis])
  placement.validate(partitioner, config, 4, num_microbatches)
  step = compilation.lower_train_step(model, partitioner, 4, 32, 16, num_microbatches).compile()
  state = placement.init_state(partitioner, model, jax.random.key(1), 4)
  batch = jax.device_put(random_batch(config, 4, 32), partitioner.batch_sharding())
  state, _ = step(state, batch, jax.random.key(2))
  carried = by_name(state.carried)
  return on_host({**by_name(state.params), **carried}), shard_shapes(carried)


@pytest.mark.slow
def test_devices_and_microbatches_share_it():
  numbers, shards = trained(2, 2, 2)
  assert_same_numbers(numbers, trained(1, 1, 1)[0])
  # [layers, B, D]: the batch is on one axis of the mesh, the width on the other.
  assert shards['layers/0'] == (2, 4 // 2, 32 // 2)


class Narrow(GatedAverage):
  def __call__(self, x, state, call):
    return x[:, :1, :3], (), {}


class Forgetful(GatedAverage):
  def init_state(self, batch_size):
    return ()


class Nameless(GatedAverage):
  def state_axes(self):
    return ()


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('mixer', [Narrow, Forgetful, Nameless])
def test_a_mixer_that_breaks_its_promise_is_named(mixer, scan_layers):
  module = Transformer(small_config(sublayers=[mixer], scan_layers=scan_layers))
  with pytest.raises(ConfigError, match=f'sublayers: {mixer.__name__} returns a'):
    jax.eval_shape(module.init, jax.random.key(0), jnp.ones([2, 4], jnp.int32))


@pytest.mark.parametrize('sublayers', [['vqq'], [], 'vq', [3], [dict]])
def test_what_is_no_sublayer_is_refused(sublayers):
  with pytest.raises(ConfigError, match=r'TransformerConfig\.sublayers.*vq.*my_module\.MyMixer'):
    Transformer(small_config(sublayers=sublayers))


def test_two_settings_of_the_sublayers_are_refused():
  with pytest.raises(ConfigError, match='attention_type'):
    small_config(sublayers=['vq'], attention_type='quadratic')
