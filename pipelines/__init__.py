"""Batch work: contribute, refine, train, benchmark, publish."""
