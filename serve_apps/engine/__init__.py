"""The serving engine: torch only, free of Ray."""
