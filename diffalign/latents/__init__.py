"""Latent spaces: what maps pixels to them, and how a denoiser moves from one to another."""
