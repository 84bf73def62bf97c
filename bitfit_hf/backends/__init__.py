"""Other people's tensors: parameters that are sharded over processes, weights that are quantized."""
