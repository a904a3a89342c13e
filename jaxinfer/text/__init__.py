"""Text at the edge: tokens of a text, text of tokens, chat templates; no JAX."""
