"""Attacks: one family a file."""
