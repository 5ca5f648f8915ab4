"""The embedded world in which every claim of the suite can be checked on a laptop."""
