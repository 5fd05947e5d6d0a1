"""Results -> terminal table, HTML page, pictures.  No torch here."""
