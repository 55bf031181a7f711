"""Auditing answers: a sweep for each adapter, on the cluster when one is up."""
