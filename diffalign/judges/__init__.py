"""Judges of images: endpoints, local models, recorded answers and the exact verifier of Shapes."""
