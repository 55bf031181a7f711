"""Which training example moved a completion, and how sure we are."""
