"""Finite policies where every expectation is a sum: what theory says of the objective, measured."""
