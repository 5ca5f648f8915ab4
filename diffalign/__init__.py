"""diffalign: align diffusion models, make them fast, and prove both."""

__version__ = "0.1.0"
