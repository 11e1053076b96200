"""The PyTorch model of an exported folder has the numbers of the JAX model."""

import json
import pathlib

import numpy as np
import pytest
from data_util import two_sentencepiece_models

torch = pytest.importorskip('torch', reason='needs the extra hf')
transformers = pytest.importorskip('transformers', reason='needs the extra hf')

import jax  # noqa: E402
import safetensors.numpy  # noqa: E402
import seqio  # noqa: E402
from util import random_params, random_tokens, small_config, small_model  # noqa: E402

from tvq_t5x.checkpoints import model_settings  # noqa: E402
from tvq_t5x.data import vocabularies  # noqa: E402
from tvq_t5x.interop import author, folder  # noqa: E402
from tvq_t5x.network import decoding  # noqa: E402
from tvq_t5x.network.longvq.longvq import LongVQ  # noqa: E402
from tvq_t5x.network.sampling import SamplingConfig  # noqa: E402
from tvq_t5x.network.transformer import Transformer  # noqa: E402

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
# Sizes of the quick start, on which few tokens repeat.
_QUICK_START = {
  'vocab_size': 264,
  'emb_dim': 128,
  'key_dim': 64,
  'value_dim': 256,
  'num_codes': 64,
  'block_len': 64,
  'window_len': 64,
}


def _longvq(**settings):
  """A LongVQ class with settings, as gin makes one."""

  def make(**kwargs):
    return cls(**kwargs)

  cls = type('LongVQ', (LongVQ,), {'__annotations__': {}, '__module__': __name__, **settings})
  return make


_KINDS = {
  'gated': {},
  'gated_multi': {'num_heads': 2, 'scan_layers': False},
  'mha': {'head_type': 'mha', 'num_heads': 2},
  'mqa': {'head_type': 'mqa', 'num_heads': 3, 'mlp_activation': 'silu'},
  'window_only': {'compressed_cache': False},
  'images': {
    'tied_embeddings': True,
    'final_norm': True,
    'absolute_positions': True,
    'logit_scale': 0.5,
  },
  # Remembers all of the sequence: what it attends to would else depend on the segments.
  'quadratic': {'attention_type': 'quadratic', 'kv_cache_len': 32},
  'longvq': {'sublayers': ('longvq', 'mlp')},
  'longvq_multi': {'sublayers': ('longvq', 'vq', 'longvq'), 'num_heads': 2},
}


@pytest.fixture(autouse=True, scope='module')
def _of_its_own(tmp_path_factory):
  """One thread, as other tests run beside; code is loaded from a folder of its own."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as patch:
    modules = str(tmp_path_factory.mktemp('modules'))
    patch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', modules)
    patch.syspath_prepend(modules)
    with torch.no_grad():
      yield
  torch.set_num_threads(threads)


def _load(path, **kwargs):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, **kwargs
  ).eval()


def _export(path, model, params, dtype='float32'):
  path.mkdir()
  folder.write_arrays(path, params, model.config, dtype)
  description = folder.Description(model_settings.settings_of(model.config), 1, {})
  folder.write_settings(path, model, description, dtype, 0.9)
  return path


@pytest.mark.parametrize(
  'name', ['case01_single_head', 'case02_pg19', 'case03_imagenet64', 'case04_multi_head']
)
def test_log_probabilities_are_the_golden_ones(name, tmp_path):
  found = dict(np.load(_GOLDEN / f'{name}.npz'))
  params = {k.removeprefix('params/'): x for k, x in found.items() if k.startswith('params/')}
  converted = author.convert(params, json.loads(str(found['config'])), name)
  model = small_model(**converted.settings)
  _export(tmp_path / 'folder', model, random_params(model.config))
  path = tmp_path / 'folder' / folder.ARRAYS
  safetensors.numpy.save_file(
    {k: np.asarray(x, order='C') for k, x in converted.params.items()}, path, {'format': 'pt'}
  )
  logits = _load(path.parent)(torch.tensor(found['inputs']).long()).logits
  ours = logits.log_softmax(-1).numpy()
  np.testing.assert_allclose(ours, found['logprobs'], atol=1e-5, rtol=1e-5)


def _nats(logits, tokens):
  """Nats [B, T] of tokens [B, T], of which the logits [B, T, W] are."""
  return -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].numpy()


@pytest.mark.parametrize('kind', _KINDS)
def test_nats_are_those_of_jax_and_blocks_those_of_tokens(kind, tmp_path):
  model = small_model(**_KINDS[kind])
  config, length, short = model.config, 23, 17
  params = random_params(config)
  tokens = random_tokens(config, 2, length)
  lengths = np.array([length, short], np.int32)
  module = model.module
  start = decoding.start(module, 2)
  read = jax.jit(lambda *args: decoding.read(module, *args))
  expected = np.asarray(read(params, start, tokens, lengths)[2])
  counts = np.arange(length) < lengths[:, None]

  theirs = _load(_export(tmp_path / 'folder', model, params))
  targets = torch.tensor(np.asarray(tokens)).long()
  inputs = torch.cat([torch.ones(2, 1).long(), targets[:, :-1]], dim=1)
  mask = torch.tensor(counts).long()
  close = {'atol': 1e-5, 'rtol': 1e-5}
  out = theirs(inputs, attention_mask=mask)
  np.testing.assert_allclose(_nats(out.logits, targets) * counts, expected, **close)
  state, nats = None, []
  for i in range(length):
    one = theirs(inputs[:, i : i + 1], state=state)
    state, nats = one.state, [*nats, _nats(one.logits, targets[:, i : i + 1])]
  np.testing.assert_allclose(np.concatenate(nats, 1) * counts, expected, **close)
  # The shorter row's state is that of its tokens, wherever padding stands.
  left = torch.roll(inputs[1:], length - short, dims=1)
  left_mask = torch.roll(mask[1:], length - short, dims=1)
  padded = theirs(left, attention_mask=left_mask)
  alone = theirs(inputs[1:, :short])
  states = [x.state for x in (alone, padded)] + [out.state.select(torch.tensor([1]))]
  after, *others = (theirs(targets[:1, :1], state=x).logits.numpy() for x in states)
  for other in others:
    np.testing.assert_allclose(other, after, **close)
  np.testing.assert_allclose(
    padded.logits[:, length - short :].numpy(), out.logits[1:, :short].numpy(), **close
  )
  sizes = [x.numel() for x in _tensors(theirs(inputs[:, :1]).state)]
  assert sizes == [x.numel() for x in _tensors(state)]


def _tensors(x):
  if isinstance(x, torch.Tensor):
    return [x]
  return [y for part in x or () for y in _tensors(part)] if isinstance(x, tuple) else []


@pytest.mark.parametrize(
  'settings',
  [
    {'use_ssm': False},
    {'attention': 'none'},
    {'attention': 'quadratic'},
    {'complex_modes': False, 'initialization': 'real', 'state_size': 3},
  ],
  ids=['attention only', 'ssm only', 'quadratic', 'real modes'],
)
def test_parts_of_longvq_are_those_of_jax(settings, tmp_path):
  model = small_model(sublayers=(_longvq(**settings),), num_layers=1, kv_cache_len=32)
  params = random_params(model.config)
  tokens = random_tokens(model.config, 2, 13)
  expected, _, _ = jax.jit(model.module.apply)({'params': params}, tokens[:, :12])
  theirs = _load(_export(tmp_path / 'folder', model, params))
  ours = theirs(torch.tensor(np.asarray(tokens[:, :12])).long()).logits.numpy()
  np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', ['gated', 'longvq'])
def test_a_thousand_greedy_tokens_are_those_of_jax(kind, tmp_path):
  config = small_config(**{**_KINDS[kind], **_QUICK_START})
  module = Transformer(config)
  tokens = random_tokens(config, 1, 1)
  params = module.init(jax.random.key(0), tokens)['params']
  model = small_model(**{**_KINDS[kind], **_QUICK_START})

  def generate(params, state):
    return decoding.generate(
      module, params, state, 1000, jax.random.key(0), SamplingConfig(0.0), allowed=model.sampled_ids
    )

  expected, scores, _ = jax.jit(generate)(params, decoding.start(module, 1))
  theirs = _load(_export(tmp_path / 'folder', model, params))
  prompt = torch.ones(1, 1).long()
  written = theirs.generate(prompt, max_new_tokens=1000, do_sample=False, eos_token_id=None)
  np.testing.assert_array_equal(written[:, 1:].numpy(), expected)
  nats = _nats(theirs(written[:, :-1]).logits, written[:, 1:])
  np.testing.assert_allclose(nats, -np.asarray(scores), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """A small model in PyTorch."""
  model = small_model()
  path = tmp_path_factory.mktemp('small') / 'folder'
  return _load(_export(path, model, random_params(model.config)))


def test_generate_samples_continues_and_searches(loaded):
  prompts = torch.tensor([[1, 3, 4, 5], [0, 0, 1, 6]])
  mask = (prompts > 0).long()
  greedy = {'do_sample': False, 'eos_token_id': None}
  both = loaded.generate(prompts, attention_mask=mask, max_new_tokens=9, **greedy)
  alone = loaded.generate(prompts[1:, 2:], max_new_tokens=9, **greedy)
  torch.testing.assert_close(both[1, 4:], alone[0, 2:])

  first = loaded.generate(prompts[:1], max_new_tokens=4, return_dict_in_generate=True, **greedy)
  rest = loaded.generate(first.sequences[:, -1:], state=first.cache, max_new_tokens=5, **greedy)
  torch.testing.assert_close(torch.cat([first.sequences, rest[:, 1:]], 1), both[:1])

  again = loaded.generate(prompts[:1], max_new_tokens=9, use_cache=False, **greedy)
  torch.testing.assert_close(again, both[:1])
  beams = loaded.generate(prompts[:1], max_new_tokens=5, num_beams=3, **greedy)
  best = loaded(beams).logits.log_softmax(-1)[:, 3:-1].gather(-1, beams[:, 4:, None]).sum()
  likeliest = loaded(both[:1, :9]).logits.log_softmax(-1)[:, 3:-1]
  assert best >= likeliest.gather(-1, both[:1, 4:9, None]).sum() - 1e-4
  assert 0 not in loaded.generate(prompts[:1], max_new_tokens=50, eos_token_id=None)


def test_labels_give_the_mean_of_nats(loaded):
  tokens = torch.tensor([[1, 3, 4, 5]])
  labels = torch.tensor([[-100, 3, -100, 5]])
  nats = _nats(loaded(tokens).logits[:, :-1], tokens[:, 1:])[0]
  loss = loaded(tokens, labels=labels).loss
  np.testing.assert_allclose(loss, (nats[0] + nats[2]) / 2, rtol=1e-6)


def test_padding_in_the_middle_is_refused(loaded):
  with pytest.raises(ValueError, match='attention_mask'):
    loaded(torch.tensor([[1, 3, 4]]), attention_mask=torch.tensor([[1, 0, 1]]))


def test_bfloat16_leaves_codebooks_as_they_are(tmp_path):
  model = small_model(sublayers=('vq', 'longvq'))
  params = random_params(model.config)
  exact = _load(_export(tmp_path / 'exact', model, params))
  rounded = _load(_export(tmp_path / 'rounded', model, params, 'bfloat16'))
  theirs = dict(rounded.named_parameters())
  for name, x in exact.named_parameters():
    kept = 'quantizer' in name or 'ssm' in name
    torch.testing.assert_close(theirs[name].float(), x if kept else x.bfloat16().float())
  assert theirs['layers.0.attention_0.query.kernel'].dtype == torch.bfloat16
  assert rounded(torch.tensor([[1, 3, 4]])).logits.isfinite().all()


def _tokenizer(path, vocabulary):
  path.mkdir()
  folder._write_tokenizer(path, vocabulary)
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    (path / folder.SENTENCEPIECE).write_bytes(vocabulary.sp_model)
  (path / 'config.json').write_text('{"model_type": "transformer_vq"}')
  return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_tokens_are_those_of_the_vocabulary(kind, tmp_path):
  vocabulary = seqio.ByteVocabulary()
  if kind == 'pieces':
    model, _ = two_sentencepiece_models(tmp_path)
    vocabulary = vocabularies.SentencePieceVocabulary(lambda: model)
  tokenizer = _tokenizer(tmp_path / 'folder', vocabulary)
  for text in ('the sea and the sky.', ' two  blanks ', '<1> <0></s>', 'a\n\tb', 'Ärger 中', ''):
    ids = tokenizer(text).input_ids
    assert ids == [1, *vocabulary.encode(text)], text
    assert tokenizer.decode(ids, skip_special_tokens=True) == vocabulary.decode(ids[1:]), text
  both = tokenizer(['a', 'the sea and the sky'], padding=True, return_tensors='pt')
  assert both.input_ids[0, 0] == 0 and both.attention_mask[0, 0] == 0
  tokenizer.save_pretrained(tmp_path / 'saved')
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved', trust_remote_code=True)
  assert again('the sea').input_ids == tokenizer('the sea').input_ids


def test_a_saved_model_is_the_same(loaded, tmp_path):
  loaded.save_pretrained(tmp_path / 'saved')
  again = _load(tmp_path / 'saved')
  tokens = torch.tensor([[1, 3, 4]])
  torch.testing.assert_close(again(tokens).logits, loaded(tokens).logits, atol=0, rtol=0)
