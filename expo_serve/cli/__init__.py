"""The command line: one command a file. Nothing here imports torch or vLLM before it must."""
