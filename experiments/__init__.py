"""Pretraining runs, comparisons and benchmarks; they use public names of `lowrank_optim` only."""
