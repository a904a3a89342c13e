"""Pure functions of arrays that models are made of."""
