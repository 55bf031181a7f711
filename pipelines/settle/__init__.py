"""Coalition retrains: what contributors, datasets, rules and adapters are worth to a benchmark."""
