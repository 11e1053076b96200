"""What `python -m tvq_t5x.plan` does: compiles a training step for TPUs that are not there."""
