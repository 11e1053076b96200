"""What is trained and how: model object, updates, optimizers, metrics, placement on a mesh."""
