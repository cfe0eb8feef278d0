"""What lies on disk: sources, headers, records of tensors. Imports no torch and knows no alpha."""
