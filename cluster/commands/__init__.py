"""One module per family of commands; each registers itself lazily."""
