"""Models: loading, towers, adapters, heads, and the roles that share one frozen base."""
