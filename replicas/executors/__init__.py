"""How plans reach ranks: in the caller's thread, or in one process a rank."""
