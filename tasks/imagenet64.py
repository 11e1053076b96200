"""`imagenet64` and `downsampled_imagenet64`: ImageNet in 64 x 64 pixels, value by value.

An image is one sequence of 12,288 tokens: its rows from the top, in each its pixels from the left,
of each pixel red, green and blue. There is no EOS. A value is a byte and a dimension, so the metric
`bits_per_byte` of training is what the literature calls bits per dimension.

Both are read as TFDS prepared them. The first 1,200,000 training images train, the rest of them
validate, and the official validation images test. The two hold the same photographs but are not
comparable, since they were made smaller in different ways:

- `imagenet64` is `imagenet_resized/64x64:0.1.0` (Chrabaszcz et al., 2017; averages over boxes;
  1,281,167 and 50,000 images). The paper's 3.16 bits belong to it.
- `downsampled_imagenet64` is `downsampled_imagenet/64x64:2.0.0` (van den Oord et al., 2016;
  1,281,149 and 49,999 images), harder to predict. Most results in the literature, about 3.4 bits,
  belong to it.
"""

import functools

from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import corpora, locations, token_cache
from tvq_t5x.gin_support.configurables import configurable
from tvq_t5x.tasks import images  # pyright: ignore[reportMissingImports]

_MACRO = 'IMAGENET64_PATH'
_RESIZED = 'imagenet_resized/64x64:0.1.0'
_DOWNSAMPLED = 'downsampled_imagenet/64x64:2.0.0'
_SPLITS = {
  'train': 'train[:1200000]',
  'validation': 'train[1200000:]',
  'test': 'validation',
}


@configurable
def corpus(path: str | None = None, name: str = _RESIZED) -> corpora.Corpus:
  """Where the images lie.

  Args:
    path: of TFDS's data directory; macro IMAGENET64_PATH. None means the environment variable
      IMAGENET64_PATH, or else the folder of --data_dir, or else TFDS's default.
    name: of the dataset.
  """
  return corpora.TfdsCorpus(name, 'image', _SPLITS, locations.data_path(_MACRO, path), _MACRO)


for _name, _corpus in (
  ('imagenet64', corpus),
  ('downsampled_imagenet64', functools.partial(corpus, name=_DOWNSAMPLED)),
):
  images.image_task(
    _name,
    __name__,
    corpora.source(_corpus, tuple(_SPLITS)),
    token_cache.CachedTask,
    corpus=_corpus,
    first_id=FIRST_BYTE,
  )
