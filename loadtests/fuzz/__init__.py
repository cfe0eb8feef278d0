"""Fuzzing: foreign files against what plans a load (``formats``), and bytes against the running server (``http``)."""
