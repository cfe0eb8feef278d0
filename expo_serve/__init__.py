"""expo-serve: serve extrapolated (ExPO) models with vLLM."""

__version__ = "0.1.0"
