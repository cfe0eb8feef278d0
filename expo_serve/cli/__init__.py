"""The command line, one command per file. Importing a command imports neither torch nor vLLM."""
