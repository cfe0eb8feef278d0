"""The state of a running command: shared by its processes, and shown on the status port."""
