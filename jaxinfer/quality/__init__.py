"""How far a quantised model is from the one it was made of, and whether that is near enough."""
