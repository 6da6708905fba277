"""How good a quantized model is: sampling, errors along trajectories, quality of images."""
