"""Records, log, registry, lineage, influence and credit."""
