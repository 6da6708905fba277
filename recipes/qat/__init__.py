"""Quantization-aware training: what the four QAT recipes are made of."""
