"""Defenses: one family a file, each a decorator of the client update."""
