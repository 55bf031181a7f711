"""Ray Data refinement that keeps a decision per example and rule."""
