"""How long a load onto a device takes, and what bounds it: the pipeline itself, on a clock of its own."""
