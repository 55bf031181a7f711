"""GPU operations of the serving engine and of influence; torch oracles beside them."""

__version__ = "0.0.0"
