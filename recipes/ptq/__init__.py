"""Post-training quantization: what the four PTQ recipes are made of."""
