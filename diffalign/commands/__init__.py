"""The verbs that need torch, one function each; the command line imports them when they are called."""
