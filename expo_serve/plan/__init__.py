"""Plans: what becomes of each tensor, decided from headers alone; whatever headers can show is refused here."""
