"""Training of autoencoders, by the phases of DC-AE."""
