"""CompVis' latent-diffusion checkpoints as diffusers pipelines."""
