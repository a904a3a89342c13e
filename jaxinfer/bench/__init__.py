"""Measurements: floors first, then times against them, all in one run."""
