"""Base against adapter on held-out rows."""
