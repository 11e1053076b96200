"""Settings of a Transformer-VQ model for the `transformers` library."""

from typing import Any

from transformers import PretrainedConfig


class TransformerVQConfig(PretrainedConfig):
  """What `config.json` says of the network.

  Attributes:
    hyperparameters: those of `tvq_t5x.TransformerConfig` by name, as JSON has them.
    vocab_size: W, ids of the vocabulary.
    hidden_size: D, width of the residual stream.
    num_hidden_layers: layers, each of the same sublayers.
  """

  model_type = 'transformer_vq'

  def __init__(self, hyperparameters: dict[str, Any] | None = None, **kwargs: Any):
    """Takes sizes from the hyperparameters; the other arguments are those of every model."""
    h = self.hyperparameters = dict(hyperparameters or {})
    kwargs |= {
      'vocab_size': h.get('vocab_size'),
      'hidden_size': h.get('emb_dim'),
      'num_hidden_layers': h.get('num_layers'),
      'tie_word_embeddings': False,  # The model shares them by itself, where it does.
    }
    super().__init__(**kwargs)
