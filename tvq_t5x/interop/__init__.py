"""Models in and out: folders with safetensors and code for PyTorch, the author's checkpoints."""
