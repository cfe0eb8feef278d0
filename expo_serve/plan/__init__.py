"""Plans: what becomes of each tensor, decided from headers alone. Every refusal of a pair or a delta is made here."""
