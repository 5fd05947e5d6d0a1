"""Other software: Flower, and what is publicly known about it."""
