"""A small Flower app whose updates are recorded and audited with leakaudit."""
