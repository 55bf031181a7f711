"""RFC 6962 transparency log in the C2SP formats."""
