"""What `python -m tvq_t5x.plan` does: compiles a training program for TPUs that are not there."""
