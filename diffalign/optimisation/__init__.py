"""Search for the options of an acceleration that fit a budget and keep the images."""
