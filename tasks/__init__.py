"""SeqIO tasks; importing a module registers its tasks."""
