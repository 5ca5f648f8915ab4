"""The verbs, one function each; the command line imports them, and most of them torch, when they are called."""
