"""Sweeps: many audits of one model, defense by defense, with utility, bounds and a gate for CI."""
