"""Every architecture of vLLM's registry: loaded both ways, bit for bit, or the reason why it cannot be."""
