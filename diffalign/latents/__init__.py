"""Latent spaces: autoencoders as codecs, and moving a denoiser from one space to another."""
