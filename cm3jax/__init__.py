"""CM3Leon in JAX/Flax: a token-based, decoder-only model of text and images (arXiv 2309.02591)."""
